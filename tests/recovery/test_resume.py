"""A checkpoint written in one layout goes on in another as if nothing had happened."""

import pytest

from tests.train.launch import (
    flags,
    largest_relative_error,
    run_train,
    tolerate_exit,
    weights,
)


def test_saved_at_tp2_resumed_at_pp2_equals_an_uninterrupted_run(tiny_model, chats, tmp_path):
    common = dict(loss="dft", train_iters=6)
    whole = run_train(1, *flags(tiny_model, chats, save_hf=tmp_path / "whole", **common))
    save = dict(save=tmp_path / "ckpt", save_interval=3)
    first = run_train(
        2,
        *flags(tiny_model, chats, tensor_model_parallel_size=2, exit_interval=3, **save, **common),
        before=tolerate_exit,
    )
    assert [s["lm loss"] for s in first] == pytest.approx(
        [s["lm loss"] for s in whole[:3]], abs=1e-5
    )
    rest = run_train(
        2,
        *flags(
            tiny_model,
            chats,
            pipeline_model_parallel_size=2,
            load=tmp_path / "ckpt",
            save_hf=tmp_path / "resumed",
            **common,
        ),
    )
    assert len(rest) == 3
    for ours, theirs in zip(rest, whole[3:], strict=True):
        for name in ("lm loss", "dft loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    resumed, uninterrupted = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert largest_relative_error(resumed, uninterrupted) <= 1e-5


def test_weights_come_from_the_checkpoint_not_from_the_model(tiny_model, chats, tmp_path):
    """Resuming does not read the Hugging Face weights again."""
    common = dict(train_iters=2, lr_decay_iters=9)
    saving = dict(save=tmp_path / "c", save_interval=1, exit_interval=1)
    run_train(1, *flags(tiny_model, chats, **saving, **common), before=tolerate_exit)
    again = flags(tiny_model, chats, load=tmp_path / "c", **common)
    (step,) = run_train(1, *again, before=_no_hf_weights)
    assert step["lm loss"] == pytest.approx(5.5, abs=1.5)


def _no_hf_weights():
    from megatron_dft.training import model

    def refuse(*args):
        raise AssertionError("the Hugging Face weights were read")

    model.load_hf_weights = refuse


def test_other_data_is_refused_in_the_middle_of_an_epoch(tiny_model, chats, tmp_path):
    """--allow-data-change lets it pass, and says what changed."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(chats.read_text().splitlines(keepends=True)[:40]))
    common = dict(train_iters=2, lr_decay_iters=9)
    saving = dict(save=tmp_path / "c", save_interval=1, exit_interval=1)
    run_train(1, *flags(tiny_model, chats, **saving, **common), before=tolerate_exit)
    again = flags(tiny_model, other, load=tmp_path / "c", **common)
    with pytest.raises(SystemExit, match="2") as refusal:
        run_train(1, *again)
    said = "".join(refusal.value.__notes__)
    assert "--allow-data-change" in said and "the content of the data" in said
    assert len(run_train(1, *again, "--allow-data-change")) == 1
