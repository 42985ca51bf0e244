"""Dense float64 references of the update statistics, from the formulas, and small checkpoints."""

import json

import numpy as np
import safetensors.torch
import torch


def write(path, tensors, config=None, shards=1):
    """A Hugging Face directory with these tensors."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    names = list(tensors)
    if shards == 1:
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[s::shards]}
        safetensors.torch.save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def tiny_model(seed=0, dtype=torch.float32, layers=2, hidden=8, vocab=19, head=True):
    """Tensors of a small Llama."""
    g = torch.Generator().manual_seed(seed)

    def new(*shape):
        return (torch.randn(*shape, generator=g) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": new(vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": new(hidden),
            p + "self_attn.q_proj.weight": new(hidden, hidden),
            p + "self_attn.k_proj.weight": new(hidden // 2, hidden),
            p + "self_attn.v_proj.weight": new(hidden // 2, hidden),
            p + "self_attn.o_proj.weight": new(hidden, hidden),
            p + "post_attention_layernorm.weight": new(hidden),
            p + "mlp.gate_proj.weight": new(3 * hidden, hidden),
            p + "mlp.up_proj.weight": new(3 * hidden, hidden),
            p + "mlp.down_proj.weight": new(hidden, 3 * hidden),
        }
    tensors["model.norm.weight"] = new(hidden)
    if head:
        tensors["lm_head.weight"] = new(vocab, hidden)
    return tensors


def perturbed(tensors, seed=1, scale=1e-2, share=1.0):
    """A copy with noise on `share` of the entries."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=g) * scale
        keep = torch.rand(value.shape, generator=g) < share
        out[name] = (value.float() + noise * keep).to(value.dtype)
    return out


def bf16(x):
    return x.to(torch.bfloat16)


COARSE_FIRST = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def has_changed(base, tuned, dtype=None):
    """Entries that differ in the load dtype: the coarsest of those stored and the one asked for."""
    kind = next(k for k in COARSE_FIRST if k in (base.dtype, tuned.dtype, dtype))
    return (base.to(kind) != tuned.to(kind)).flatten().numpy()


def is_near_zero(base, share=0.1):
    """Below the tensor's own quantile of magnitudes, or 0."""
    size = base.double().abs().flatten().numpy()
    if not len(size):
        return np.zeros(0, dtype=bool)
    return (size < np.sort(size)[int(share * len(size))]) | (size == 0)


def statistics(pairs, dtype=None):
    """The numbers of one report row for [(base, tuned), ...], all entries together, in float64."""
    changes = np.concatenate([has_changed(*p, dtype) for p in pairs])
    near = np.concatenate([is_near_zero(p[0]) for p in pairs])
    b = torch.cat([p[0].double().flatten() for p in pairs]).numpy()
    d = torch.cat([(p[1].double() - p[0].double()).flatten() for p in pairs]).numpy()
    same = torch.cat([(bf16(p[0]) == bf16(p[1])).flatten() for p in pairs]).numpy()
    a = np.abs(d)
    n = len(d)
    norm, base = np.sqrt((d**2).sum()), np.sqrt((b**2).sum())
    largest = np.sort(a)[::-1][: -(-n // 100)]
    rising = np.sort(a)
    index = np.arange(1, n + 1)
    changed = bool((a > 0).any())
    return {
        "parameters": n,
        "base_norm": base,
        "update_norm": norm,
        "relative_norm": norm / base if base else None,
        "max_abs": a.max(),
        "mean": d.mean(),
        "mean_abs": a.mean(),
        "unchanged": 1 - changes.mean(),
        "near_zero": near.mean(),
        "changed_near_zero": (changes & near).sum() / changes.sum() if changes.any() else None,
        "unchanged_rel_1e-5": (a <= 1e-5 * np.abs(b)).mean(),
        "unchanged_bf16": same.mean(),
        "unchanged_1e-5": (a.astype(np.float32) <= np.float32(1e-5)).mean(),
        "top1pct_share": (largest**2).sum() / (d**2).sum() if changed else None,
        "gini": ((2 * index - n - 1) * rising).sum() / (n * rising.sum()) if changed else None,
    }


def assert_close(got, want, relative=2e-6):
    """Every statistic against its reference; histogram statistics within their stated error."""
    for key, value in want.items():
        if value is None:
            assert got[key] is None, key
            continue
        slack = relative * abs(value)
        if key == "mean":  # a cancelling sum is as exact as its terms
            slack = relative * want["mean_abs"]
        if key in ("top1pct_share", "gini"):
            slack = 2.0**-9 * 1.01
        if key.startswith("unchanged") or key in ("parameters", "near_zero", "changed_near_zero"):
            slack = 1e-12
        assert abs(got[key] - value) <= slack, (key, got[key], value)
