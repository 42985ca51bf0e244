"""The drift command's files: complete, consistent with each other, self-contained, escaped."""

import csv
import json
import os
import re
import warnings

import pytest
import torch

from megatron_dft.commands import drift as command
from megatron_dft.drift import report, style
from megatron_dft.drift.labels import labels_for
from megatron_dft.drift.page import Picture, Section, Table, render
from tests.drift.commands import fails, run
from tests.drift.reference import perturbed, tiny_model, write
from tests.hf.tiny import make_tiny, tiny_tokenizer


@pytest.fixture
def paths(tmp_path):
    base = tiny_model()
    return [
        write(tmp_path / name, tensors)
        for name, tensors in (("base", base), ("sft", perturbed(base)), ("dft", perturbed(base, 2)))
    ]


def test_files_agree(paths, tmp_path, capsys):
    out = tmp_path / "out"
    run(command, *paths, "--out", out, "--workers", 1)
    report = json.loads((out / "drift.json").read_text())
    assert list(report["methods"]) == ["sft", "dft"]
    with (out / "drift.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    levels = {"model": 1, "layer": 3, "module": 10, "tensor": 21}
    for level, count in levels.items():
        assert sum(r["level"] == level and r["method"] == "dft" for r in rows) == count
    for row in rows:
        if row["level"] == "tensor":
            want = report["methods"][row["method"]]["tensors"][row["name"]]
            assert float(row["update_norm"]) == want["update_norm"]
            assert row["sigma1"] == ("" if want["sigma1"] is None else str(want["sigma1"]))
    names = {"layers", "modules", "heatmap", "concentration", "stable_rank", "near_zero"}
    names |= {"principal", "principal_places"}
    names |= {"agreement", "agreement_layers", "agreement_modules"}
    assert {p.stem for p in out.glob("*.png")} == names
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    # Nothing is fetched: every source and link is inline or an anchor.
    targets = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', page)
    assert all(t.startswith(("data:", "#")) for t in targets)
    norm = report["methods"]["sft"]["model"]["update_norm"]
    assert f"{norm:.4g}" in page and f"update_norm {norm:.4g}" in capsys.readouterr().out
    assert not list(out.glob("*.partial"))


def test_token_texts_are_named_and_escaped(tmp_path):
    a = make_tiny("llama-tied", tmp_path / "a")
    b = make_tiny("llama-tied", tmp_path / "b", seed=2)
    run(command, a, b, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "drift.json").read_text())
    tokens = report["methods"]["b"]["tokens"]["model.embed_tokens.weight"]["top"]
    tokenizer = tiny_tokenizer()
    assert all(t["text"] == repr(tokenizer.decode([t["id"]])) for t in tokens)


def test_no_pictures_break_on_no_update(paths, tmp_path):
    run(command, paths[0], paths[0], "--out", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_one_bare_tensor(tmp_path):
    for name, value in (("a", 0.0), ("b", 1.0)):
        write(tmp_path / name, {"w": torch.tensor(value)}, {})
    run(command, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert report["methods"]["b"]["model"]["relative_norm"] is None


def test_labels(paths, tmp_path):
    fails(command, "--labels: expected 2 different names", *paths, "--labels", "x")
    fails(command, "--labels: expected 2 different names", *paths, "--labels", "x", "x")
    fails(command, "--workers: expected 1 or more", *paths, "--workers", 0)
    same = [tmp_path / "r1" / "hf", tmp_path / "r2" / "hf"]
    assert labels_for(same, None) == ["hf-1", "hf-2"]


def test_page_escapes_everything():
    bad = "<img src=x onerror=alert(1)>\"'&"
    page = render(
        bad,
        bad,
        [Section(bad, [bad], [Picture(bad, b"", bad)], [Table((bad,), [[bad]], bad)], (bad, bad))],
    )
    assert "<img src=x" not in page and 'alert(1)>"' not in page


def test_names_of_models_are_text_in_pictures_pages_and_tables_too(tmp_path):
    """Formulas, underscores (a legend drops them), newlines, bytes that are no UTF-8."""
    base = tiny_model()
    nasty = ["$\\frac{$", "_hidden", "a\nb <script>", os.fsdecode(b"caf\xe9"), "x" * 200 + "$"]
    paths = [write(tmp_path / "base", base)]
    paths += [write(tmp_path / n, perturbed(base, i + 1)) for i, n in enumerate(nasty)]
    out = tmp_path / "out"
    result = command.compare(paths[0], paths[1:], nasty, workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write(out, result, None)
    assert len(list(out.glob("*.png"))) == 9
    assert "<script>alert" not in (out / "report.html").read_text()
    with (out / "drift.csv").open() as handle:
        assert {row["method"] for row in csv.DictReader(handle)} >= set(nasty[:3])


@pytest.mark.parametrize("text", ["$x$", "$", r"\$x$", "$$", "_a", "a\nb\x00", "ok"])
def test_a_name_in_a_picture_is_drawn_letter_by_letter(text):
    figure, (ax,) = style.figure()
    ax.plot([0], [0], label=style.plain(text))
    (shown,) = ax.legend().get_texts()
    style.png(figure)
    drawn, is_formula = shown._preprocess_math(shown.get_text())
    assert not is_formula
    assert drawn.strip() == "".join(c if c.isprintable() else " " for c in text).strip()
