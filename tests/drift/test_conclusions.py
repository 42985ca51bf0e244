"""What the pages' sentences say, for figures of which the answer is plain."""

import pytest

from megatron_dft.drift import conclusions, retention_report
from megatron_dft.drift.labels import model_name
from megatron_dft.drift.style import bar, line


def report(**models):
    return {"methods": {label: {"model": row} for label, row in models.items()}}


def shares(both):
    row = {"left": 0.1, "right": 0.1, "both": both, "both_chance": 0.01}
    return {"measured": 1.0, "k": {"8": row}}


def row(norm, unchanged, near=0.1, both=0.01, top=0.05):
    return {
        "relative_norm": norm,
        "unchanged": unchanged,
        "near_zero": 0.1,
        "changed_near_zero": near,
        "top1pct_share": top,
        "principal": shares(both),
    }


def test_the_overview_names_the_extremes_and_who_is_as_sparse_as_rl():
    text = conclusions.overview(report(sft=row(0.02, 0.1), rl=row(0.001, 0.8), ice=row(0, 1.0)))
    assert "0.1% (rl) to 2.0% (sft) of the base's norm, 20 times apart" in text
    assert "10.0% (sft) to 100.0% (ice) of them kept" in text
    assert text.endswith("or sparser: rl, ice.")
    assert "None is as sparse" in conclusions.overview(report(sft=row(0.02, 0.1)))
    assert conclusions.overview(report(a=row(0, 1.0))).startswith("Nothing moved")


def test_where_names_who_is_on_and_off_the_principal_directions():
    text = conclusions.where(report(a=row(1, 0, both=0.05), b=row(1, 0, near=0.3, both=0.001)))
    assert "0.1 times (b) to 5 times (a)" in text
    assert "on them lie a, off them lie b." in text and "sought out by b." in text
    text = conclusions.where(report(a=row(1, 0), b=row(1, 0)))
    assert "none lies on or off them" in text and "not preferred" in text


def test_agreement_names_the_most_alike_pair():
    found = {
        "cosine": [[1, 0.05, None], [0.05, 1, None], [None] * 3],
        "jaccard": [[1, 0.4, None], [0.4, 1, None], [None] * 3],
        "jaccard_by_chance": [[1, 0.2, None], [0.2, 1, None], [None] * 3],
    }
    text = conclusions.agreement({"agreement": {"labels": ["a", "b", "c"], "model": found}})
    assert "a · b: cosine 0.05" in text and "0.40 (0.20 by chance). 1 of 1 pairs" in text


@pytest.mark.parametrize(
    ("perplexity", "end"), [((11, 12), "least, as it did"), ((12, 11), "but b lost least")]
)
def test_retention_holds_the_kl_against_what_was_lost(perplexity, end):
    methods = {
        label: {
            "general": {"base_perplexity": 10.0, "perplexity": lost},
            "task": {"kl": kl},
        }
        for label, lost, kl in zip("ab", perplexity, (0.1, 0.5), strict=True)
    }
    text = retention_report.conclusion({"texts": ["general", "task"], "methods": methods})
    assert "by 10 % (" in text and "to 20 % (" in text and "a, b lost more" in text
    assert "a should have forgotten" in text and end in text and "--task-samples" in text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/Qwen2.5-7B", "Qwen2.5-7B"),
        ("runs/dft-7/hf", "dft-7/hf"),
        ("/ckpt/run/iter_0000200", "run/iter_0000200"),
        ("Qwen/Qwen3-8B/", "Qwen3-8B"),
    ],
)
def test_names_of_models(path, name):
    assert model_name(path) == name


def test_lines_differ_without_colour():
    looks = [(line(i)["marker"], str(line(i)["linestyle"])) for i in range(70)]
    assert len(set(looks)) == 70
    assert len({bar(i)["hatch"] for i in range(13)}) == 13
