"""Every statistic of an update against its float64 formula, at the edges too."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dft.drift import histogram, support
from megatron_dft.drift.checkpoint import open_checkpoint
from megatron_dft.drift.moments import BLOCK, BlockStatistics, Moments, count_support
from megatron_dft.drift.pair import match
from megatron_dft.drift.spectrum import spectrum
from tests.drift.reference import assert_close, perturbed, statistics, tiny_model, write
from tests.drift.reports import report

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def measured(base, tuned):
    """Statistics of one tensor in memory, block by block."""
    moments, block = Moments(), BlockStatistics()
    b, t = base.float().flatten(), tuned.float().flatten()
    masks = np.empty((2, BLOCK), dtype=bool)
    is_coarse = base.dtype == torch.bfloat16
    threshold = support.quantile(lambda: b.split(BLOCK), len(b), is_coarse, support.QUANTILE)
    for s in range(0, b.numel(), BLOCK):
        part = slice(s, s + BLOCK)
        stored_bf16 = base.dtype == tuned.dtype == torch.bfloat16
        assert block.add(moments, b[part], (t - b)[part], t[part], stored_bf16)
        changed = support.changed(b[part], t[part], (t - b)[part], None, masks[0])
        near = support.is_near_zero(b[part], threshold, masks[1])
        count_support(moments, changed, near)
    return moments.statistics()


floats = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
values = st.lists(st.tuples(floats, floats), min_size=1, max_size=300)


@settings(max_examples=150, deadline=None)
@given(values, st.sampled_from(DTYPES[:3]), st.booleans())
def test_any_entries(pairs, dtype, freeze):
    base = torch.tensor([p[0] for p in pairs]).to(dtype)
    tuned = base.clone() if freeze else torch.tensor([p[1] for p in pairs]).to(dtype)
    assert_close(measured(base, tuned), statistics([(base, tuned)]), relative=1e-5)


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ([0.0], [0.0]),
        ([0.0], [-0.0]),
        ([0.0], [3.0]),
        ([1.0] * 100, [1.0] * 99 + [2.0]),
        ([0.0] * 5, [1e-5] * 5),
        ([1.0, 1.0], [1.0, 1.0 + 2.0**-10]),
        ([1e20, 1.0], [-1e20, 1.0]),
        ([1e-25, 2e-25], [3e-25, 2e-25]),
    ],
)
def test_edges(base, tuned):
    pair = torch.tensor(base), torch.tensor(tuned)
    assert_close(measured(*pair), statistics([pair]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_one_block(dtype):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(BLOCK * 2 + 7, generator=g).to(dtype)
    tuned = (base.float() + 1e-3 * torch.randn(len(base), generator=g) ** 3).to(dtype)
    assert_close(measured(base, tuned), statistics([(base, tuned)]))


def test_heavy_tail_concentrates():
    """The histogram's shares tell a flat update from a concentrated one."""
    base, flat = torch.zeros(10_000), torch.full((10_000,), 0.5)
    spike = torch.zeros(10_000)
    spike[17] = 1.0
    assert measured(base, flat)["gini"] == pytest.approx(0, abs=1e-9)
    assert measured(base, flat)["top1pct_share"] == pytest.approx(0.01, abs=1e-9)
    assert measured(base, spike)["gini"] == pytest.approx(1 - 1e-4, abs=1e-9)
    assert measured(base, spike)["top1pct_share"] == 1.0


def test_curve_of_shares():
    x = torch.rand(5000, generator=torch.Generator().manual_seed(2))
    counts = histogram.Histogram()
    counts.add(x, torch.empty(5000, dtype=torch.int32))
    shares = [0.01, 0.1, 0.5, 1.0]
    energy = np.sort(x.double().numpy() ** 2)[::-1]
    want = [energy[: int(5000 * s)].sum() / energy.sum() for s in shares]
    assert np.allclose(
        histogram.lorenz(*pickle.loads(pickle.dumps(counts)).occupied(), shares), want, atol=2e-3
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_level_of_a_model(tmp_path, dtype, shards):
    base = tiny_model(dtype=dtype)
    tuned = perturbed(base, share=0.6)
    got = report(write(tmp_path / "a", base, shards=shards), write(tmp_path / "b", tuned))
    levels = got["methods"]["m0"]

    def want(select):
        return statistics([(base[n], tuned[n]) for n in base if select(n)])

    assert set(levels["tensors"]) == set(base)
    assert list(levels["tensors"])[::20] == ["model.embed_tokens.weight", "lm_head.weight"]
    for name, row in levels["tensors"].items():
        assert_close(row, want(lambda n, name=name: n == name))
    for layer, row in levels["layers"].items():
        assert_close(
            row,
            want(lambda n, i=layer: f"layers.{i}." in n if i != "outside" else "layers." not in n),
        )
    assert_close(levels["modules"]["gate"], want(lambda n: "gate_proj" in n))
    assert_close(levels["modules"]["norm"], want(lambda n: "norm" in n))
    assert set(levels["modules"]) == {
        "embed", "q", "k", "v", "o", "gate", "up", "down", "norm", "head",
    }  # fmt: skip
    assert_close(levels["model"], want(lambda n: True))
    heat = levels["heatmap"]
    cell = heat["relative_norm"][heat["layers"].index("1")][heat["modules"].index("o")]
    assert cell == pytest.approx(want(lambda n: "layers.1.self_attn.o" in n)["relative_norm"])
    assert heat["relative_norm"][0][heat["modules"].index("head")] is None


def test_tokens_and_cosines_of_two_methods(tmp_path):
    base = tiny_model()
    first, second = perturbed(base, 1), perturbed(base, 2)
    second = {n: v + 0.5 * (first[n] - base[n]) for n, v in second.items()}
    embed = "model.embed_tokens.weight"
    first[embed] = base[embed].clone()
    first[embed][7] += 1.0
    first[embed][3, 0] -= 0.5
    got = report(
        *(write(tmp_path / k, t) for k, t in zip("abc", (base, first, second), strict=True))
    )
    rows = got["methods"]["m0"]["tokens"][embed]
    assert (rows["rows"], rows["changed_rows"], rows["median_norm"]) == (19, 2, 0.0)
    assert [t["id"] for t in rows["top"]] == [7, 3]
    delta = (first[embed] - base[embed]).double().norm(dim=1)
    relative = delta / base[embed].double().norm(dim=1)
    assert rows["top"][0]["norm"] == pytest.approx(float(delta[7]))
    assert rows["top"][0]["relative"] == pytest.approx(float(relative[7]))

    def cosine(names):
        x = torch.cat([(first[n] - base[n]).double().flatten() for n in names])
        y = torch.cat([(second[n] - base[n]).double().flatten() for n in names])
        return float(x @ y / x.norm() / y.norm())

    assert got["agreement"]["model"]["cosine"][0][1] == pytest.approx(cosine(base), rel=1e-5)
    assert got["agreement"]["model"]["cosine"][1][0] == got["agreement"]["model"]["cosine"][0][1]
    assert got["agreement"]["model"]["cosine"][1][1] == pytest.approx(1)
    assert got["agreement"]["tensors"][embed]["cosine"][0][1] == pytest.approx(
        cosine([embed]), abs=1e-6
    )
    downs = [n for n in base if "down" in n]
    assert got["agreement"]["modules"]["down"]["cosine"][0][1] == pytest.approx(
        cosine(downs), rel=1e-5
    )
    # Both methods keep their own statistics, also where the update is read a second time.
    for i, tuned in enumerate((first, second)):
        for name in base:
            want = statistics([(base[name], tuned[name])])
            row = got["methods"][f"m{i}"]["tensors"][name]
            assert_close(row, want)
            if len(row["shape"]) == 2:
                exact = torch.linalg.matrix_norm((tuned[name] - base[name]).double(), 2)
                assert row["sigma1"] == pytest.approx(float(exact), rel=1e-5)


def test_no_update_at_all(tmp_path):
    base = tiny_model()
    got = report(write(tmp_path / "a", base), write(tmp_path / "b", base))
    row = got["methods"]["m0"]["model"]
    assert row["update_norm"] == 0 and row["unchanged_bf16"] == 1 and row["gini"] is None
    assert got["methods"]["m0"]["tensors"]["lm_head.weight"]["stable_rank"] is None
    assert got["agreement"]["model"]["cosine"] == [[None]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (40, 3), (96, 200), (200, 150), (150, 400)])
@pytest.mark.parametrize("rank", [1, 7, None])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_spectrum_within_its_error(shape, rank, scale):
    g = torch.Generator().manual_seed(shape[0])
    rank = min(shape) if rank is None else min(rank, *shape)
    delta = torch.randn(shape[0], rank, generator=g) @ torch.randn(rank, shape[1], generator=g)
    delta *= scale
    exact = torch.linalg.svdvals(delta.double())
    energy = float((delta.double() ** 2).sum())
    got = spectrum(delta, energy)
    top = float(exact[0])
    assert got.sigma1 <= top * (1 + 1e-5)
    assert min(abs(got.sigma1 - float(s)) for s in exact) <= got.error + 1e-5 * top
    assert got.sigma1 >= 0.97 * top
    assert got.stable_rank == pytest.approx(energy / got.sigma1**2)
    assert got.top_share == pytest.approx(got.sigma1**2 / energy)
    assert got.top4_share <= float((exact[:4] ** 2).sum()) / energy * (1 + 1e-5)
    if rank == 1:
        assert got.error <= 1e-5 * top
    if min(shape) <= 96 or rank == 1:
        assert got.sigma1 == pytest.approx(top, rel=1e-5)
        assert got.top4_share == pytest.approx(float((exact[:4] ** 2).sum()) / energy, rel=1e-4)
    else:
        assert got.error <= (0.01 if rank == 7 else 0.3) * got.sigma1
    if min(shape) <= 96:
        assert got.error == 0


def test_spectrum_error_is_not_idle():
    """A spectrum that eight steps cannot resolve says so."""
    delta = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    got = spectrum(delta, float((delta.double() ** 2).sum()))
    assert 0 < got.error < 0.3 * got.sigma1
    assert math.isfinite(got.error)


def test_rows_that_blocks_cut(tmp_path):
    """A row's norm is right where one block ends and the next begins in it."""
    g = torch.Generator().manual_seed(3)
    rows, columns = 6000, 51
    assert BLOCK % columns and rows * columns > BLOCK
    base = {"model.embed_tokens.weight": torch.randn(rows, columns, generator=g)}
    tuned = perturbed(base)
    cut = BLOCK // columns
    tuned["model.embed_tokens.weight"][[cut - 1, cut, cut + 1]] += 5.0
    got = report(
        write(tmp_path / "a", base), write(tmp_path / "b", tuned), write(tmp_path / "c", tuned)
    )
    b, t = (x["model.embed_tokens.weight"].double() for x in (base, tuned))
    for method in ("m0", "m1"):
        top = got["methods"][method]["tokens"]["model.embed_tokens.weight"]["top"]
        assert {r["id"] for r in top[:3]} == {cut - 1, cut, cut + 1}
        for row in top:
            norm = (t - b)[row["id"]].norm()
            assert row["norm"] == pytest.approx(float(norm), rel=1e-5)
            assert row["relative"] == pytest.approx(float(norm / b[row["id"]].norm()), rel=1e-5)


def test_float64_updates_below_float32_resolution(tmp_path):
    base = {"w": torch.ones(10, 10, dtype=torch.float64)}
    tuned = {"w": base["w"] + 1e-12}
    got = report(write(tmp_path / "a", base), write(tmp_path / "b", tuned))
    assert got["methods"]["m0"]["model"]["update_norm"] == pytest.approx(1e-11, rel=1e-3)


def test_stored_types_may_differ_and_tensors_may_be_empty(tmp_path):
    base = tiny_model() | {"empty": torch.zeros(0, 8), "model.h.0.wte.weight": torch.zeros(0, 8)}
    tuned = {n: v.to(torch.bfloat16) for n, v in perturbed(base).items()}
    a, b = write(tmp_path / "a", base), write(tmp_path / "b", tuned)
    got = report(a, b)["methods"]["m0"]
    assert_close(got["model"], statistics([(base[n], tuned[n]) for n in base]))
    assert got["tensors"]["empty"]["update_norm"] == 0
    notes = match(open_checkpoint(a), open_checkpoint(b)).notes
    assert len(notes) == 1 and "float32 in the base and torch.bfloat16" in notes[0]
