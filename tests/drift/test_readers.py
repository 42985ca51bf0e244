"""Checkpoints that fit, and one clear line for each that does not; nothing is unpickled."""

import io
import json
import math
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from megatron_dft.drift.checkpoint import open_checkpoint
from megatron_dft.drift.torch_dist_reader import _runs
from tests.drift.reference import assert_close, perturbed, statistics, tiny_model, write
from tests.drift.reports import report
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks


def fails(text, base, tuned):
    with pytest.raises(ValueError) as caught:
        report(base, tuned)
    message = str(caught.value)
    assert text in message and "\n" not in message, message


@pytest.fixture
def pair(tmp_path):
    base = tiny_model()
    return write(tmp_path / "a", base), write(tmp_path / "b", perturbed(base))


def rewrite(path, change):
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


def test_nan_and_infinity_are_named_with_their_place(pair):
    rewrite(pair[1], lambda t: t[Q][3].__setitem__(5, float("nan")))
    fails(f"{pair[1]}: {Q}[3, 5] is nan", *pair)
    rewrite(pair[0], lambda t: t[Q][3].__setitem__(5, float("inf")))
    fails(f"{pair[0]}: {Q}[3, 5] is inf", *pair)


def test_missing_extra_and_reshaped_tensors(pair):
    bias = {Q.replace("weight", "bias"): torch.zeros(8)}
    rewrite(pair[1], lambda t: t.update(bias))
    fails(f"{pair[0]} lacks 1 tensors of its counterpart, such as {next(iter(bias))}", *pair)
    rewrite(pair[1], lambda t: (t.pop(next(iter(bias))), t.pop(Q)))
    fails(f"{pair[1]} lacks 1 tensors of its counterpart, such as {Q}", *pair)
    rewrite(pair[1], lambda t: t.update({Q: torch.zeros(8, 9)}))
    fails(f"{Q} is [8, 9] in {pair[1]}, but [8, 8]", *pair)


def test_another_architecture(pair):
    (pair[1] / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    fails("its model_type is 'qwen2', the base has 'llama'", *pair)
    (pair[1] / "config.json").write_text("{")
    fails("config.json is not JSON", *pair)


def test_quantised_weights(pair):
    rewrite(pair[1], lambda t: t.update({Q: torch.zeros(8, 8, dtype=torch.int8)}))
    fails(f"{Q} is stored as torch.int8", *pair)


def test_buffers_are_no_weights(pair):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(pair[1], lambda t: t.update({name: torch.zeros(4)}))
    assert name not in report(*pair)["methods"]["m0"]["tensors"]


def test_damaged_files(pair):
    file = pair[1] / "model.safetensors"
    data = file.read_bytes()
    for content, text in (
        (data[:-7], "(truncated)"),
        (data[:5], "5 bytes are no safetensors file"),
        (b"", "0 bytes are no safetensors file"),
        (struct.pack("<Q", 1 << 60) + data[8:], "are no safetensors file"),
        (data[:8] + b"x" + data[9:], "the safetensors header is not JSON"),
        (data.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1), "is stored as F99"),
        (data.replace(b'"shape":[19,8]', b'"shape":[19,9]', 1), "its shape needs"),
    ):
        file.write_bytes(content)
        fails(text, *pair)


def test_file_cut_while_read(pair):
    checkpoint = open_checkpoint(pair[1])
    reader = checkpoint.open("model.norm.weight")
    os.truncate(pair[1] / "model.safetensors", 100)
    with pytest.raises(ValueError, match="truncated while read"):
        reader.read(0, torch.empty(8))


def test_shards(tmp_path):
    base = tiny_model()
    a, b = write(tmp_path / "a", base), write(tmp_path / "b", base, shards=3)
    (b / "model-00002-of-00003.safetensors").rename(tmp_path / "away")
    fails("1 of 3 shards are missing (model-00002-of-00003.safetensors)", a, b)
    (b / "model-00002-of-00003.safetensors").write_bytes(
        (b / "model-00001-of-00003.safetensors").read_bytes()
    )
    fails("is in two shards", a, b)
    index = b / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../away"}}))
    fails("'../away', which is no file of its directory", a, b)
    index.write_text("[]")
    fails("has no readable weight_map", a, b)


class Bomb:
    """Unpickling this leaves a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_refused_unread(tmp_path, pair):
    mark = tmp_path / "ran"
    evil = tmp_path / "evil"
    evil.mkdir()
    fails("holds no *.safetensors", pair[0], evil)
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    fails("holds pickled weights only (pytorch_model.bin)", pair[0], evil)
    (evil / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    fails("is not torch_dist metadata: it holds no Metadata", pair[0], evil)
    fails("is not a directory", pair[0], tmp_path / "nowhere")
    (evil / ".metadata").unlink()
    (evil / "adapter_model.safetensors").write_bytes(b"")
    fails("merge it into its base first", pair[0], evil)
    assert not mark.exists()


def test_pickled_shards_of_torch_dist_are_not_run(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "dcp"
    dcp.save({"w": torch.ones(4000)}, checkpoint_id=path, no_dist=True)
    torch.save(Bomb(mark), next(path.glob("*.distcp")))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.length = next(path.glob("*.distcp")).stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    fails("is damaged", path, path)
    assert not mark.exists()


def test_a_shard_that_is_not_what_the_table_says(tmp_path):
    path = tmp_path / "dcp"
    dcp.save({"w": torch.arange(12.0).reshape(4, 3)}, checkpoint_id=path, no_dist=True)
    shard = next(path.glob("*.distcp"))
    size = shard.stat().st_size
    for tensor, text in (
        (torch.arange(12.0).reshape(3, 4).T, "stored row by row"),
        (torch.zeros(4, 3, dtype=torch.float64), "not the torch.float32 tensor [4, 3]"),
        (torch.zeros(3, 4), "not the torch.float32 tensor [4, 3]"),
    ):
        blob = io.BytesIO()
        torch.save(tensor, blob)
        shard.write_bytes(blob.getvalue().ljust(size, b"\0"))
        metadata = pickle.loads((path / ".metadata").read_bytes())
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(blob.getvalue())
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        fails(text, path, path)


@given(st.data())
def test_runs_of_a_window(data):
    """The runs cover a window's elements, each once, in rising order."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    starts, length = _runs(shape, offsets, sizes)
    window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    want = np.arange(math.prod(shape)).reshape(shape)[window].ravel()
    assert np.array_equal((starts[:, None] + np.arange(length)).ravel(), want)


@pytest.mark.parametrize("stored", ["neither", "base", "tuned", "both"])
def test_a_tied_head_counts_once(tmp_path, stored):
    config = {"model_type": "llama", "tie_word_embeddings": True}
    base = tiny_model(head=False)
    tuned = perturbed(base)
    embed = "model.embed_tokens.weight"
    want = statistics([(base[n], tuned[n]) for n in base])
    for name, tensors in (("base", base), ("tuned", tuned)):
        head = {"lm_head.weight": tensors[embed].clone()} if stored in (name, "both") else {}
        write(tmp_path / name, tensors | head, config)
    got = report(tmp_path / "base", tmp_path / "tuned")
    assert_close(got["methods"]["m0"]["model"], want)
    assert "head" not in got["methods"]["m0"]["modules"]


def test_torch_dist_of_one_process(tmp_path):
    base = tiny_model(dtype=torch.bfloat16)
    tuned = perturbed(base)
    for name, tensors in (("a", base), ("b", tuned)):
        extra = {"optimizer.state.x": torch.zeros(3), "rng_state": torch.zeros(2)}
        dcp.save(tensors | extra, checkpoint_id=tmp_path / name / "iter_0000012", no_dist=True)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("12\n")
    rows = report(tmp_path / "a", tmp_path / "b")["methods"]["m0"]["tensors"]
    assert set(rows) == set(base)
    for name, row in rows.items():
        assert_close(row, statistics([(base[name], tuned[name])]))
    shard = next((tmp_path / "b" / "iter_0000012").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    fails("is truncated", tmp_path / "a", tmp_path / "b")
    shard.unlink()
    fails("which is missing", tmp_path / "a", tmp_path / "b")
    tracker = tmp_path / "b" / "latest_checkpointed_iteration.txt"
    tracker.write_text("13")
    fails("is no torch_dist checkpoint", tmp_path / "a", tmp_path / "b")
    tracker.write_text("garbage")
    fails("expected an iteration number", tmp_path / "a", tmp_path / "b")


def _save_megatron(sources, outs):
    import multiprocessing

    from megatron.core import dist_checkpointing

    from megatron_dft.hf.load import load_hf_weights
    from megatron_dft.hf.source import open_checkpoint as open_hf
    from tests.hf import megatron_model

    # The writer starts helper processes, which a daemonic test rank may not.
    multiprocessing.current_process()._config["daemon"] = False
    megatron_model.start(tp=2)
    models = megatron_model.build(sources[0])
    for source, out in zip(sources, outs, strict=True):
        load_hf_weights(models, open_hf(source))
        os.makedirs(out, exist_ok=True)
        state = models[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
        dist_checkpointing.save(state, out)


def test_megatron_torch_dist_equals_its_hugging_face_source(tmp_path):
    """Both forms of one pair, the Megatron ones written at TP2, have the same update."""
    paths = [make_tiny("llama", tmp_path / f"hf{i}", seed=i, vocab_size=260) for i in range(2)]
    outs = [str(tmp_path / f"dist{i}") for i in range(2)]
    run_ranks(_save_megatron, 2, [str(p) for p in paths], outs)
    want = report(*paths)["methods"]["m0"]
    got = report(tmp_path / "dist0", tmp_path / "dist1")["methods"]["m0"]
    for key in ("parameters", "base_norm", "update_norm", "max_abs", "mean_abs", "gini"):
        assert got["model"][key] == pytest.approx(want["model"][key], rel=1e-5)
    for level, keys in (
        ("modules", ("embed", "head", "norm", "down", "o")),
        ("layers", ("0", "1", "2", "3", "outside")),
    ):
        for key in keys:
            assert got[level][key]["update_norm"] == pytest.approx(
                want[level][key]["update_norm"], rel=1e-5
            )
    assert got["tensors"]["decoder.layers.1.mlp.linear_fc2.weight"]["sigma1"] == pytest.approx(
        want["tensors"]["model.layers.1.mlp.down_proj.weight"]["sigma1"], rel=1e-5
    )


def test_offline_import_equals_its_hugging_face_source(tmp_path):
    """The importer writes no checksums, and cuts tensors into boxes of rows."""
    from megatron_dft.hf.convert_import import import_checkpoint
    from megatron_dft.hf.source import open_checkpoint as open_hf

    paths = [make_tiny("llama", tmp_path / f"hf{i}", seed=i, vocab_size=260) for i in range(2)]
    dists = [import_checkpoint(open_hf(p), tmp_path / f"dist{p.name}") for p in paths]
    want, got = (report(*pair)["methods"]["m0"]["model"] for pair in (paths, dists))
    assert got["parameters"] == want["parameters"]
    assert got["update_norm"] == pytest.approx(want["update_norm"], rel=1e-6)
