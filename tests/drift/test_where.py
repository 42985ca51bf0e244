"""Where an update sits: subspaces, weights near zero, sparsity, supports, in float64."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dft.commands import drift as command
from megatron_dft.drift import principal, support
from megatron_dft.drift.checkpoint import open_checkpoint
from megatron_dft.drift.compare import Comparison
from megatron_dft.drift.pair import match
from megatron_dft.drift.summary import Summary
from tests.drift.commands import fails, run
from tests.drift.reference import (
    assert_close,
    has_changed,
    is_near_zero,
    perturbed,
    statistics,
    tiny_model,
    write,
)

KS = (1, 3, 64)


def report(base, *tuned, dtype=None, ks=KS):
    left, rights = open_checkpoint(base), [open_checkpoint(t) for t in tuned]
    names = match(left, rights[0]).names
    summary = Summary([f"m{i}" for i in range(len(tuned))])
    for tensor in Comparison(left, rights, names, 2, principal_ks=ks, load_dtype=dtype).run():
        summary.add(tensor)
    return summary.report(names)


def dense_shares(base, delta, k):
    """(left, right, both) by LAPACK in float64; directions that the rank lacks count nothing."""
    u, s, vh = torch.linalg.svd(base.double(), full_matrices=False)
    k = min(k, int((s > s[0] * max(base.shape) * 2.0**-23).sum()))
    u, v, d = u[:, :k], vh[:k].T, delta.double()
    return [float((x**2).sum() / (d**2).sum()) for x in (u.T @ d, d @ v, u.T @ d @ v)]


def spectrum_like(shape, decay, g, rank=None):
    """A matrix whose singular values fall as i^-decay, 0 beyond `rank`."""
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
    values = torch.arange(1, len(s) + 1).float() ** -decay
    values[len(s) if rank is None else rank :] = 0
    return (u * values) @ vh


@pytest.mark.parametrize("shape", [(700, 520), (520, 900)])
@pytest.mark.parametrize(
    ("decay", "rank", "tolerance"),
    # Falling spectra as trained weights have them; a flat one, where no direction stands out.
    [(0.7, None, 1e-6), (0.2, None, 3e-4), (0.0, None, None), (0.5, 5, 1e-6)],
)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_shares_of_large_matrices(shape, decay, rank, tolerance, scale):
    g = torch.Generator().manual_seed(shape[0])
    base = spectrum_like(shape, decay, g, rank)
    delta = torch.randn(shape, generator=g) / 100 + 3 * base / base.norm()
    found = principal.directions(base * scale, 16)
    assert 2 * principal.basis_width(16) < min(shape)  # not the whole decomposition
    energy = float(((delta * scale).double() ** 2).sum())
    got = principal.shares(delta * scale, energy, found, (1, 4, 16))
    for k, one in got.items():
        if tolerance is None:
            # Any k directions will do; what they are is exact for a base this near.
            assert one.residual < 0.5
            continue
        want = dense_shares(base, delta, k)
        assert [one.left, one.right, one.both] == pytest.approx(want, abs=tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (30, 7), (7, 30), (150, 200)])
def test_shares_of_small_matrices_are_exact(shape):
    g = torch.Generator().manual_seed(3)
    base, delta = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    found = principal.directions(base, 64)
    got = principal.shares(delta, float((delta.double() ** 2).sum()), found, KS)
    for k in KS:
        want = dense_shares(base, delta, k)
        assert [got[k].left, got[k].right, got[k].both] == pytest.approx(want, abs=1e-6)
        assert got[k].residual == 0
    # The short side's whole space holds every Δ.
    assert max(got[64].left, got[64].right) == pytest.approx(1) or min(shape) > 64


def test_the_bases_own_direction_and_one_orthogonal_to_it():
    g = torch.Generator().manual_seed(5)
    base = spectrum_like((300, 200), 1.0, g)
    u, _, vh = torch.linalg.svd(base)
    found = principal.directions(base, 2)
    inside = principal.shares(torch.outer(u[:, 0], vh[0]), 1.0, found, (1,))[1]
    assert [inside.left, inside.right, inside.both] == pytest.approx([1, 1, 1], abs=1e-5)
    mixed = principal.shares(torch.outer(u[:, 0], vh[9]), 1.0, found, (1,))[1]
    assert [mixed.left, mixed.right, mixed.both] == pytest.approx([1, 0, 0], abs=1e-5)
    assert principal.directions(torch.zeros(4, 4), 2) is None
    assert principal.shares(torch.zeros(300, 200), 0.0, found, (1,)) is None
    assert principal.chance((300, 200), 30) == (0.1, 0.15, pytest.approx(0.015))


floats = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(floats, min_size=1, max_size=80),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(0, 0.99),
)
def test_the_quantile_is_the_sorted_entry(values, dtype, share):
    block = torch.tensor(values).to(dtype).float()
    block = block[block.isfinite()]
    got = support.quantile(lambda: block.split(7), len(block), dtype == torch.bfloat16, share)
    if not len(block):
        assert got == 0
        return
    assert got == float(np.sort(block.abs().numpy())[int(share * len(block))])
    near = support.is_near_zero(block, got, np.empty(len(block), dtype=bool))
    assert (near == is_near_zero(block, share)).all()


def test_near_zero_of_constants():
    """All alike: none is small. All zero: all are."""
    out = np.empty(5, dtype=bool)
    for value, want in ((1.0, 0), (0.0, 5)):
        block = torch.full((5,), value)
        edge = support.quantile(lambda b=block: [b], 5, False, 0.1)
        assert support.is_near_zero(block, edge, out).sum() == want


@pytest.mark.parametrize(
    ("base_kind", "tuned_kind", "asked"),
    [
        (torch.float32, torch.float32, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float16, None),
        (torch.float64, torch.float64, torch.float16),
    ],
)
def test_every_level_of_two_methods(tmp_path, base_kind, tuned_kind, asked):
    base = tiny_model(dtype=base_kind, layers=2, hidden=12)
    tuned = [
        {n: v.to(tuned_kind) for n, v in perturbed(base, seed, 3e-4, share).items()}
        for seed, share in ((1, 0.3), (2, 0.9))
    ]
    directories = [write(tmp_path / k, t) for k, t in zip("abc", (base, *tuned), strict=True)]
    got = report(*directories, dtype=asked)
    layer = [n for n in base if "layers.1." in n]
    down = [n for n in base if "down" in n]
    places = (("model", None, list(base)), ("layers", "1", layer), ("modules", "down", down),
              ("tensors", down[0], down[:1]))  # fmt: skip
    for level, key, names in places:
        for i, method in enumerate(tuned):
            row = got["methods"][f"m{i}"][level]
            row = row[key] if key else row
            assert_close(row, statistics([(base[n], method[n]) for n in names], asked))
            _check_principal(row, base, method, [n for n in names if base[n].ndim == 2])
        pairs = got["agreement"][level]
        _check_pairs(pairs[key] if key else pairs, base, tuned, names, asked)


def _check_principal(row, base, tuned, names):
    energy = {n: float(((tuned[n].double() - base[n].double()) ** 2).sum()) for n in names}
    whole = row["update_norm"] ** 2
    assert row["principal"]["measured"] == pytest.approx(sum(energy.values()) / whole, rel=1e-5)
    for k in KS:
        found = row["principal"]["k"][str(k)]
        want = sum(
            energy[n] * np.array(dense_shares(base[n], tuned[n].double() - base[n].double(), k))
            for n in names
        ) / sum(energy.values())
        assert [found["left"], found["right"], found["both"]] == pytest.approx(want, abs=1e-5)
        expected = sum(energy[n] * min(k / base[n].shape[1], 1) for n in names)
        assert found["right_chance"] == pytest.approx(expected / sum(energy.values()), rel=1e-5)


def _check_pairs(pairs, base, tuned, names, asked):
    sets = [np.concatenate([has_changed(base[n], t[n], asked) for n in names]) for t in tuned]
    deltas = [
        torch.cat([(t[n].double() - base[n].double()).flatten() for n in names]) for t in tuned
    ]
    both, either = (sets[0] & sets[1]).sum(), (sets[0] | sets[1]).sum()
    assert pairs["jaccard"][0][1] == pairs["jaccard"][1][0] == pytest.approx(both / either)
    assert pairs["jaccard"][0][0] == 1
    p, q = sets[0].mean(), sets[1].mean()
    assert pairs["jaccard_by_chance"][0][1] == pytest.approx(p * q / (p + q - p * q))
    want = float(deltas[0] @ deltas[1] / deltas[0].norm() / deltas[1].norm())
    assert pairs["cosine"][0][1] == pytest.approx(want, abs=2e-6)


def test_no_update_and_no_matrix(tmp_path):
    base = {"model.norm.weight": torch.ones(5), "w": torch.zeros(6, 4)}
    tuned = base | {"model.norm.weight": torch.tensor([1.0, 1, 1, 1, 2])}
    got = report(*(write(tmp_path / k, t) for k, t in zip("abc", (base, base, tuned), strict=True)))
    still, moved = (got["methods"][m]["model"] for m in ("m0", "m1"))
    assert still["unchanged"] == 1 and still["changed_near_zero"] is None
    assert still["principal"] is None and moved["principal"] is None
    assert moved["unchanged"] == 28 / 29 and moved["near_zero"] == 24 / 29
    assert got["agreement"]["model"]["jaccard"] == [[None, 0.0], [0.0, 1.0]]


def test_the_command_writes_them(tmp_path):
    base = tiny_model(dtype=torch.float32)
    paths = [write(tmp_path / "base", base), write(tmp_path / "sft", perturbed(base))]
    out = tmp_path / "out"
    run(command, *paths, "--out", out, "--principal-k", 2, 5, "--load-dtype", "bfloat16")
    result = json.loads((out / "drift.json").read_text())
    model = result["methods"]["sft"]["model"]
    assert list(model["principal"]["k"]) == ["2", "5"] and result["load_dtype"] == "bfloat16"
    assert model["unchanged"] == model["unchanged_bf16"]
    header = (out / "drift.csv").read_text().splitlines()[0]
    assert "principal_both_5" in header and "changed_near_zero" in header
    run(command, *paths, "--out", out, "--principal-k", 0)
    result = json.loads((out / "drift.json").read_text())
    assert result["methods"]["sft"]["model"]["principal"] is None
    fails(command, "--principal-k: expected numbers from 1", *paths, "--principal-k", -3)
