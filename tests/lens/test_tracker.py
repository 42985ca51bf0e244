"""Drift logged in training equals the offline report, under every way to lay a model out."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dft.lens.parameters import all_labels, layer_labels, tracked_parameters
from megatron_dft.lens.tracker import TrackedParameter, UpdateTracker
from tests.drift.reference import perturbed, statistics, write
from tests.drift.reports import report
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks


def test_layer_labels_cover_the_layers_evenly():
    assert layer_labels(4, 2) == ["layers-0-1"] * 2 + ["layers-2-3"] * 2
    assert layer_labels(3, 4) == ["layer-0", "layer-1", "layer-2"]
    labels = layer_labels(30, 4)
    assert [labels.count(x) for x in dict.fromkeys(labels)] == [8, 7, 8, 7]
    assert all(int(x.split("-")[1]) <= i <= int(x.split("-")[2]) for i, x in enumerate(labels))
    assert all_labels(2, 4) == ["embedding", "layer-0", "layer-1", "head", "other"]


def _values(pair, got, rel=1e-6):
    want = statistics(pair)
    for key in ("update_norm", "relative_norm", "unchanged_bf16"):
        assert got[key] == pytest.approx(want[key], rel=rel, abs=1e-12), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process(dtype):
    g = torch.Generator().manual_seed(0)
    start = {n: torch.randn(7, 5, generator=g).to(dtype) for n in "abc"}
    live = {n: v.clone() for n, v in start.items()}
    live["c"] = live["c"].t().contiguous().t()  # not contiguous, as some shards are
    labels = {"a": "x", "b": "x", "c": "y"}
    tracker = UpdateTracker(
        [
            TrackedParameter(v, labels[n], elements=20 if n == "b" else None)
            for n, v in live.items()
        ],
        ["x", "y", "empty"],
    )
    assert tracker.measure()["model"] == {
        "update_norm": 0.0,
        "relative_norm": 0.0,
        "unchanged_bf16": 1.0,
    }
    for v in live.values():
        v += (torch.rand(v.shape, generator=g) < 0.4) * 0.01
    got = tracker.measure()
    pairs = {n: (start[n], live[n]) for n in "abc"}
    pairs["b"] = tuple(t.flatten()[:20] for t in pairs["b"])  # what is behind is padding
    _values([pairs["a"], pairs["b"]], got["x"])
    _values([pairs["c"]], got["y"])
    _values(list(pairs.values()), got["model"])
    assert got["empty"]["update_norm"] == 0
    with pytest.raises(ValueError, match="label 'z'"):
        UpdateTracker([TrackedParameter(live["a"], "z")], ["x"])


def test_a_large_tensor_is_compared_in_pieces(monkeypatch):
    monkeypatch.setattr("megatron_dft.lens.tracker._CHUNK", 7)
    start = torch.randn(40, generator=torch.Generator().manual_seed(1))
    live = start.clone()
    tracker = UpdateTracker([TrackedParameter(live, "w")], ["w"])
    live += torch.arange(40) * 0.01
    _values([(start, live)], tracker.measure()["model"])


def _replicas_rank():
    """Rank r of 4: two model shards, each held by two replicas, one tensor on all four."""
    r = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    shard = torch.arange(12.0).view(2, 6)[r // 2].clone()
    norm = torch.ones(3)
    tracker = UpdateTracker(
        [
            TrackedParameter(shard, "w", replicas=pairs[r // 2]),
            TrackedParameter(norm, "norm", counted=r < 2, replicas=pairs[r // 2]),
        ],
        ["w", "norm"],
    )
    kept = sum(p.start.numel() for p in tracker._parts)
    shard += 0.5
    norm -= 0.25
    return tracker.measure(), kept


def test_each_element_is_counted_once_and_kept_once():
    results = run_ranks(_replicas_rank, 4)
    start, norm = torch.arange(12.0), torch.ones(3)
    for got, _ in results:
        _values([(start, start + 0.5)], got["w"])
        _values([(norm, norm - 0.25)], got["norm"])
        _values([(start, start + 0.5), (norm, norm - 0.25)], got["model"])
    assert sum(kept for _, kept in results) == 15  # all replicas together hold one copy


def _layout_rank(base, tuned, layout, num_layers, vocab_size):
    """Load `base`, make the tracker, load `tuned` into the same parameters, measure."""
    from megatron_dft.hf.load import load_hf_weights
    from megatron_dft.hf.source import open_checkpoint
    from tests.hf import megatron_model

    megatron_model.start(**layout)
    # Megatron allows experts with tensor parallelism only together with sequence parallelism.
    experts = "expert_model_parallel_size" in layout
    build = {"sequence_parallel": True} if experts and layout.get("tp", 1) > 1 else {}
    models = megatron_model.build(base, pad_to=8, **build)
    load_hf_weights(models, open_checkpoint(base))
    labels = all_labels(num_layers, 2)
    tracker = UpdateTracker(tracked_parameters(models, num_layers, vocab_size, 2), labels)
    load_hf_weights(models, open_checkpoint(tuned))
    # Padded rows move in training, but belong to no checkpoint.
    for model in models:
        for name, p in model.named_parameters():
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                rank = layout["tp"] - 1 if layout.get("tp", 1) > 1 else 0
                if dist.get_rank() % layout.get("tp", 1) == rank:
                    p.data[-1] += 7.0
    return tracker.measure()


LAYOUTS = {
    "tp2": ("llama", 2, dict(tp=2)),
    "pp2-tied": ("llama-tied", 2, dict(pp=2)),
    "dp2": ("llama", 2, dict()),
    "tp2-pp2": ("qwen3", 4, dict(tp=2, pp=2)),
    "tp2-ep2": ("qwen3-moe", 2, dict(tp=2, expert_model_parallel_size=2)),
    "ep2": ("mixtral", 2, dict(expert_model_parallel_size=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_offline_report(layout, tmp_path):
    kind, world, sizes = LAYOUTS[layout]
    if "expert_model_parallel_size" in sizes and "tp" in sizes:
        sizes = {**sizes, "expert_tensor_parallel_size": 1}
    base, tuned = (make_tiny(kind, tmp_path / f"m{i}", seed=i) for i in range(2))
    results = run_ranks(_layout_rank, world, str(base), str(tuned), sizes, 4, 259)
    offline = report(base, tuned)["methods"]["m0"]
    for got in results:
        assert got == results[0]
        for key in ("update_norm", "relative_norm", "unchanged_bf16"):
            assert got["model"][key] == pytest.approx(offline["model"][key], rel=1e-6), key
        for label, layers in (("layers-0-1", "01"), ("layers-2-3", "23")):
            want = np.sqrt(sum(offline["layers"][k]["update_norm"] ** 2 for k in layers))
            assert got[label]["update_norm"] == pytest.approx(want, rel=1e-6)
        embedding = offline["modules"]["embed"]["relative_norm"]
        assert got["embedding"]["relative_norm"] == pytest.approx(embedding, rel=1e-6)


def test_offline_reference_is_the_same_definition(tmp_path):
    """The tracker's three numbers are the report's, on the same tensors."""
    base = {"model.layers.0.mlp.up_proj.weight": torch.randn(30, 20)}
    tuned = perturbed(base, share=0.3)
    offline = report(write(tmp_path / "a", base), write(tmp_path / "b", tuned))
    live = base["model.layers.0.mlp.up_proj.weight"].clone()
    tracker = UpdateTracker([TrackedParameter(live, "w")], ["w"])
    live.copy_(tuned["model.layers.0.mlp.up_proj.weight"])
    got = tracker.measure()["model"]
    for key, value in got.items():
        assert value == pytest.approx(offline["methods"]["m0"]["model"][key], rel=1e-6)
