"""`megatron-dft compare`: what is read of runs, what the table and the sentences say of it."""

import csv
import json
import math
from pathlib import Path

import pytest

from megatron_dft import cli
from megatron_dft.drift import run_conclusions, run_figures, run_report
from megatron_dft.drift.run_log import Run, read_runs
from tests.drift.runs import run, sweep, write_events


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("runs") / "sweep")


def made(label: str, held_out: dict[int, float], **settings: str) -> Run:
    figures = {"lm loss": {1: 2.0, 40: 1.0}, "lm loss validation": held_out}
    return Run(label, Path(label), {k: v for k, v in figures.items() if v}, settings, 60.0, "")


def test_a_sweep_is_the_runs_below_it_and_settings_are_the_arguments(swept):
    runs = read_runs([swept])
    assert [r.label for r in runs] == [
        f"{loss}-{rate}" for loss in ("dft", "sft") for rate in ("1e-5", "2e-5", "5e-5")
    ]
    assert [r.number("lr") for r in runs] == [1e-5, 2e-5, 5e-5] * 2
    assert {r.status for r in runs} == {"finished"} and {r.step for r in runs} == {200}
    assert runs[0].directory == (swept / "dft-1e-5").resolve()
    # Neither where a run is kept, nor a figure twice.
    assert list(run_figures.differing(runs)) == ["loss", "lr"]
    assert runs[0].figures.keys() == run("dft", 1e-5, range(1, 2)).keys()
    assert len(runs[0].figures["lm loss"]) == 200


def test_steps_trained_again_after_a_crash_count_once(tmp_path):
    folder = tmp_path / "a" / "tensorboard"
    first = {"lm loss": {s: 1.0 for s in range(1, 31)}, "lm loss validation": {15: 9.0, 25: 9.0}}
    again = {"lm loss": {s: 2.0 for s in range(21, 41)}, "lm loss validation": {40: 8.0}}
    # The later start's file comes first by name.
    write_events(folder, again, {"lr": 2}, time=2e9)
    write_events(folder, first, {"lr": 1}, time=1e9)
    legs = tmp_path / "a" / "legs"
    for leg, word in ((2, "hang 30\n"), (10, "stopped 40\n")):
        (legs / str(leg)).mkdir(parents=True)
        (legs / str(leg) / "status").write_text(word)
    (one,) = read_runs([tmp_path / "a"])
    assert one.figures["lm loss"] == {s: 1.0 if s < 21 else 2.0 for s in range(1, 41)}
    assert one.figures["lm loss validation"] == {15: 9.0, 40: 8.0}
    assert one.settings == {"lr": "2"} and one.seconds == 29 + 19 and one.status == "stopped"


def test_nan_is_counted_and_a_file_that_is_being_written_is_read(tmp_path):
    write_events(tmp_path / "a", {"lm loss": {1: 1.0, 2: math.nan, 3: math.inf, 4: 2.0}})
    (file,) = (tmp_path / "a").iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # the last event, `vs samples`, is half there
    (one,) = read_runs([tmp_path / "a"])
    assert one.figures["lm loss"] == {1: 1.0, 4: 2.0} and one.not_finite == 2
    assert "NaN or inf, in no table: a 2." in " ".join(run_conclusions.warnings([one]))
    run_report.write(tmp_path / "out", [one])
    json.loads((tmp_path / "out" / "compare.json").read_text(), parse_constant=pytest.fail)


def test_names_tell_runs_apart(tmp_path):
    for name in ("x/dft", "y/dft"):
        write_events(tmp_path / name / "tensorboard", {"lm loss": {1: 1.0}})
    paths = [tmp_path / "x", tmp_path / "y"]
    assert [r.label for r in read_runs(paths)] == ["x/dft", "y/dft"]
    assert [r.label for r in read_runs(paths, ["one", "two"])] == ["one", "two"]
    for labels in (["one"], ["one", "one"]):
        with pytest.raises(ValueError, match="--labels: expected 2 different names.*x/dft, y/dft"):
            read_runs(paths, labels)


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    write_events(tmp_path / "empty", {}, {"lr": 1})
    for path, message in (
        (tmp_path / "nowhere", "is not a directory; train with --tensorboard-dir"),
        (tmp_path, "has event files without a figure yet"),
    ):
        assert cli.main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="has no TensorBoard event files"):
        read_runs([tmp_path / "bare"])


def test_the_row_of_a_run(swept):
    runs = {r.label: r for r in read_runs([swept])}
    row = run_figures.row(runs["sft-5e-5"])
    exact = run("sft", 5e-5, range(1, 201))
    late = [exact["lm loss"][s] for s in range(181, 201)]
    evaluated = exact["lm loss validation"]
    assert row["lm loss"] == pytest.approx(sum(late) / 20, rel=1e-6)
    assert row["held-out lm loss"] == pytest.approx(evaluated[200], rel=1e-6)
    assert row["at step"] == min(evaluated, key=evaluated.__getitem__) == 80
    assert row["mean p"] == pytest.approx(math.exp(-evaluated[200]), rel=1e-6)
    assert (row["step"], row["of"], row["hours"]) == (200, 200, pytest.approx(199 / 3600))


def test_what_the_sentences_conclude(swept):
    runs = read_runs([swept])
    word, text = run_conclusions.verdict(runs)
    assert word == "dft-5e-5 ends with the lowest cross entropy"
    assert "0.5015" in text and "dft-2e-5 follows" in text and "megatron-dft evaluate" in text
    assert "evaluate" not in run_conclusions.verdict(runs[:3])[1], "one loss: no caveat"
    rose = run_conclusions.cross_entropy(runs)
    assert "sft-5e-5 by 26 % since step 80" in rose and "sft-2e-5" not in rose and "dft" not in rose
    assert "No run's held-out" in run_conclusions.cross_entropy(runs[:3])
    rates = run_conclusions.by_rate(runs)
    assert "dft: 0.5015 at 5e-05, the largest rate tried: try a larger one" in rates
    assert "sft: 0.7144 at 2e-05." in rates
    assert not run_figures.groups_by_rate([runs[0], runs[3]]), "one rate a loss: nothing to draw"
    assert not run_conclusions.warnings(runs)


def test_what_may_not_be_compared_is_said():
    runs = [
        made("a", {40: 1.0}, valid_data="x", hf_model="m"),
        made("b", {}, valid_data="y", hf_model="m"),
        made("c", {20: 1.0}, valid_data="x", hf_model="n"),
    ]
    runs[2].figures["lm loss"].pop(40)
    said = " ".join(run_conclusions.warnings(runs))
    assert "evaluated on different data" in said and "different models" in said
    assert "Without held-out figures: b" in said and "at step 40: c 20." in said
    assert run_conclusions.verdict([runs[1]])[1].startswith("1 nats a token in training")
    spiky = Run("s", Path("s"), {"grad-norm": {1: 50.0, 2: 1.0, 3: 1.0}}, {}, 0.0, "")
    assert "s 50 times" in run_conclusions.optimizer([spiky])
    assert run_conclusions.verdict([spiky])[0] == "No cross entropy"
    low = Run("l", Path("l"), {"dft/end-prob": {1: 0.2}}, {}, 0.0, "")
    assert "below 0.5: 0.2 (l)" in run_conclusions.confidence([low])


def test_the_command_writes_a_page_a_table_and_the_pictures(swept, tmp_path, capsys):
    assert cli.main(["compare", str(swept), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "sft-2e-5" in said and "held-out lm loss" in said and "compare.html" in said
    page = (tmp_path / "compare.html").read_text()
    assert "6 runs of Qwen2.5-Math-1.5B, side by side" in page and page.count("<img") == 4
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["lr"] for r in rows] == ["1e-05", "2e-05", "5e-05"] * 2
    assert float(rows[0]["held-out lm loss"]) == pytest.approx(0.6807, abs=1e-4)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["differing"]["loss"] == ["dft"] * 3 + ["sft"] * 3
    assert len(found["runs"]["sft-1e-5"]["figures"]["lm loss"]) == 200
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "by_rate.png", "cross_entropy.png", "confidence.png", "optimizer.png"
    }  # fmt: skip
