"""Stored reference scores: right, the same in every layout, resumable, and trained on alike."""

import functools
import json

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.train import reference
from tests.train.launch import flags, run_train
from tests.train.scored import (
    FAR,
    LAYOUTS,
    PAIRS,
    RUNS,
    TRAINING,
    _refusal,
    check_content,
    die_after_two_segments,
    hear_segments,
    is_refused,
    iw_sft,
    no_frozen_model,
    score,
    score_flags,
    stored,
)


@pytest.fixture(scope="module")
def expected(tiny_model, chats):
    """transformers' float32 log-softmax of each supervised token; 0 for the others."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    parts = []
    for ids, trained in reference.read_rows(tiny_model, chats):
        # The conversation ends with its last supervised token.
        size = max(i for i, t in enumerate(trained) if t) + 1
        tokens, mask = torch.tensor(ids[:size]), torch.tensor(trained[1:size])
        with torch.no_grad():
            log_p = model(tokens[None, :-1]).logits[0].log_softmax(-1)
        parts.append(log_p.gather(-1, tokens[1:, None]).squeeze(-1) * mask)
    return torch.cat(parts).numpy()


@pytest.fixture(scope="module")
def scores(tmp_path_factory, tiny_model, chats):
    """Scored once on one rank, one conversation a row."""
    out = tmp_path_factory.mktemp("scores") / "scores"
    score(1, score_flags(tiny_model, chats, out))
    return out


def test_scores_are_the_log_softmax_of_transformers(scores, expected):
    got = stored(scores)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5
    assert not (scores / "segments").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_alike(layout, tiny_model, chats, tmp_path, expected):
    world_size, given = LAYOUTS[layout]
    score(world_size, score_flags(tiny_model, chats, tmp_path / "scores", **given))
    assert np.abs(stored(tmp_path / "scores") - expected).max() <= 1e-5


def test_expert_parallel_ranks_score_as_one(chats, tmp_path):
    """Their all-to-alls need every replica to run equally many micro-batches."""
    from tests.hf.tiny import make_tiny

    model = make_tiny("qwen3-moe", tmp_path / "model")
    for name, ranks, given in (("one", 1, {}), ("ep2", 2, dict(expert_model_parallel_size=2))):
        score(ranks, score_flags(model, chats, tmp_path / name, **given))
    assert np.abs(stored(tmp_path / "one") - stored(tmp_path / "ep2")).max() <= 1e-5


def test_a_megatron_checkpoint_is_scored_in_another_layout(tiny_model, chats, tmp_path, scores):
    """psft's old policy: the trained weights of --load, not those of --hf-model."""
    save, out, loaded = tmp_path / "save", tmp_path / "out", tmp_path / "loaded"
    common = dict(loss="psft", lr=2e-2)
    first = dict(save=save, save_interval=9, save_hf=out, train_iters=2)
    run_train(1, *flags(tiny_model, chats, dft_reference_scores=scores, **first, **common))
    argv = score_flags(tiny_model, chats, loaded, load=save)
    score(2, [*argv, "--tensor-model-parallel-size", "2"])
    score(1, score_flags(out, chats, tmp_path / "exported"))
    assert np.abs(stored(loaded) - stored(tmp_path / "exported")).max() <= 1e-5
    assert np.abs(stored(loaded) - stored(scores)).max() > 0.1
    # The run may not go on against another reference without a word.
    again = dict(load=save, train_iters=4, dft_reference_scores=loaded)
    with pytest.raises(SystemExit, match="2") as refusal:
        run_train(1, *flags(tiny_model, chats, **again, **common))
    assert "--allow-change loss" in "".join(refusal.value.__notes__)


@pytest.fixture(scope="module")
def frozen(tiny_model, chats):
    @functools.cache
    def run(name, loss):
        world_size, given, only_scores = RUNS[name]
        argv = flags(tiny_model, chats, loss=loss, **FAR | given)
        return run_train(1 if only_scores else world_size, *argv)

    return run


@pytest.mark.parametrize(("name", "loss"), PAIRS)
def test_training_with_scores_is_training_with_the_model(
    frozen, name, loss, tiny_model, chats, scores
):
    world_size, given, only_scores = RUNS[name]
    argv = flags(
        tiny_model, chats, loss=loss, dft_reference_scores=scores, **FAR | given | only_scores
    )
    got, expected = run_train(world_size, *argv, before=no_frozen_model), frozen(name, loss)
    assert len(got) == 3
    for ours, theirs in zip(got, expected, strict=True):
        for figure in ("lm loss", f"{loss} loss", "dft/mean-weight", "dft/mean-prob"):
            assert ours[figure] == pytest.approx(theirs[figure], abs=1e-5), figure
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert abs(got[-1]["dft/mean-weight"] - 1) > 1e-2


def test_a_killed_run_goes_on_with_the_rest(tiny_model, chats, tmp_path, scores):
    out = tmp_path / "scores"
    argv = score_flags(tiny_model, chats, out)
    with pytest.raises(KeyboardInterrupt):
        score(1, argv, die_after_two_segments)
    assert not (out / "scores.json").exists()
    ((status, text),) = run_ranks(_refusal, 1, "train", iw_sft(tiny_model, chats, out), init=False)
    assert status == 2 and "unfinished" in text
    # The borders are those of the first start, whatever is asked for now.
    score(1, score_flags(tiny_model, chats, out, score_segment_tokens=99), hear_segments)
    count = len(json.loads((out / "scores.json").read_text())["borders"])
    assert count > 3
    assert (out / "heard").read_text().split() == [str(i) for i in range(2, count)]
    assert (stored(out) == stored(scores)).all()
    # Whole scores are left as they are.
    (out / "heard").unlink()
    score(2, argv, hear_segments)
    assert not (out / "heard").exists()


@pytest.mark.parametrize("case", TRAINING)
def test_scores_that_do_not_fit_the_run(case, tiny_model, chats, scores):
    given, words = TRAINING[case]
    is_refused("train", iw_sft(tiny_model, chats, scores, **given), words)


def test_scores_of_other_data(tiny_model, chats, scores, tmp_path):
    other = tmp_path / "other.jsonl"
    lines = chats.read_text().splitlines()
    other.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    is_refused("train", iw_sft(tiny_model, other, scores), ["content of the data"])
    is_refused("score", score_flags(tiny_model, other, scores), ["content of the data"])


def test_scores_of_another_tokenizer_or_template(tiny_model, chats, scores, tmp_path):
    template = tmp_path / "template.jinja"
    source = (tiny_model / "chat_template.jinja").read_text()
    template.write_text(source.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"))
    assert template.read_text() != source
    argv = iw_sft(tiny_model, chats, scores, chat_template=template)
    is_refused("train", argv, ["the chat template"])


def test_scores_of_another_model(chats, scores, tmp_path):
    from tests.hf.tiny import make_tiny

    other = make_tiny("llama", tmp_path / "other", vocab_size=259, seed=5)
    is_refused("score", score_flags(other, chats, scores), ["weights"])


def test_damaged_scores(tiny_model, chats, tmp_path, scores):
    out = tmp_path / "scores"
    out.mkdir()
    (out / "scores.json").write_bytes((scores / "scores.json").read_bytes())
    (out / "scores.f32").write_bytes((scores / "scores.f32").read_bytes()[:-4])
    is_refused("train", iw_sft(tiny_model, chats, out), ["scores.f32", "bytes"])


def test_scoring_needs_a_directory(tiny_model, chats):
    is_refused("score", flags(tiny_model, chats), ["expected a directory"])


def test_scores_that_were_changed_since(tiny_model, chats, scores, tmp_path):
    """Also where size and time of modification are as they were, and the hash was noted before."""
    import os
    import shutil

    changed = tmp_path / "scores"
    shutil.copytree(scores, changed)
    file = changed / "scores.f32"
    os.utime(file, (1e9, 1e9))
    values = stored(changed)
    check_content(changed, tmp_path)
    assert list((tmp_path / "hashes").iterdir()) == []  # too fresh to be noted
    (values - 5).tofile(file)
    os.utime(file, (1e9, 1e9))
    words = ["is not what was scored", "SHA-256", "score again"]
    is_refused("train", iw_sft(tiny_model, chats, changed), words)


def test_the_hash_of_scores_is_taken_once_and_again_when_the_file_changes(
    scores, tmp_path, monkeypatch
):
    import hashlib
    import os
    import shutil

    from megatron_dft.data import cache

    changed = tmp_path / "scores"
    shutil.copytree(scores, changed)
    file = changed / "scores.f32"
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1e9)
    check_content(changed, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        check_content(changed, tmp_path)
    times = file.stat()
    (stored(changed) - 5).tofile(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="is not what was scored"):
        check_content(changed, tmp_path)
