"""examples/compare: its rows, figures and verdicts, and the whole of it on stand-ins for tuning."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "study"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "compare"))

import compare
import corpus
import measure
import methods
import results
import rows
import sizes
import verdicts

from megatron_dft import cli


def test_problems_ask_for_the_right_sum_whatever_is_shown():
    shown = corpus.noisy_sums(40, 0.5, 1)
    asked = rows.problems(shown)
    right = [
        corpus.addition(*(int(x) for x in (p[4] + p[6], p[10] + p[12])))["completion"].strip()
        for p in (row["prompt"] for row in asked)
    ]
    assert [row["answer"] for row in asked] == right
    assert all(a["prompt"] == s["prompt"] + " " for a, s in zip(asked, shown, strict=True))
    assert (
        sum(a["answer"] == s["completion"].strip() for a, s in zip(asked, shown, strict=True)) == 20
    )
    tested = {row["prompt"] for row in corpus.clean_sums(500)}
    assert not tested & {row["prompt"] for row in rows.validation(500)}


def test_the_matched_model_is_the_first_that_reaches_the_score():
    curve = [{"greedy": g} for g in (0.2, 0.5, 0.4, 0.9)]
    assert results.matched(curve, 0.45) is curve[1] and results.matched(curve, 0.95) is None


def figure(*values):
    return {"mean": sum(values) / len(values), "values": list(values)}


def test_a_verdict_needs_every_seed_and_its_factor():
    def verdict(claim, es, grpo):
        fields = ("relative_norm", "unchanged_bf16", "kl", "kl_task", "greedy")
        table = {"es": dict.fromkeys(fields, es), "grpo": dict.fromkeys(fields, grpo)}
        found = verdicts.check({"end": {}, "matched": table})
        return next(row["verdict"] for row in found if row["claim"].startswith(claim))

    for es, grpo, far, ten in (
        (figure(5, 5), figure(1, 1), "yes", "no"),
        (figure(30, 30), figure(1, 2), "yes", "yes"),
        (figure(30, 30), figure(1, 4), "yes", "unclear"),
        (figure(1, 1), figure(2, 2), "no", "no"),
    ):
        assert verdict("ES moves the weights further", es, grpo) == far
        assert verdict("ES moves them ten times", es, grpo) == ten
    assert verdict("offline DFT beats RFT", figure(1), figure(1)) == "not run"


def test_rank_correlation_is_spearmans():
    assert verdicts.ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    assert verdicts.rank_correlation([1, 2, 3, 10], [1, 4, 9, 100]) == pytest.approx(1)
    assert verdicts.rank_correlation([1, 2, 3, 4], [4, 1, 3, 2]) == pytest.approx(-0.4)
    assert verdicts.rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_what_cannot_run_says_why(monkeypatch):
    method = methods.Method("train", "kept", loss="no-such-loss")
    assert methods.missing(method) == "this release has no --loss no-such-loss"
    assert methods.missing(methods.METHODS["es"]) is None
    assert methods.missing(methods.METHODS["offline-dft"]) is None


class StandIns:
    """Sampling, verifying, ES and measuring as they are; trainers that only move the weights."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, argv, log):
        words = list(argv)
        self.calls.append(words[0] if module == "megatron_dft.cli" else Path(module).stem)
        if module == "megatron_dft.cli":
            if words[0] in ("drift", "retention"):  # their own tests draw pages
                out = Path(words[words.index("--out") + 1])
                out.mkdir(exist_ok=True)
                (out / f"{words[0]}.json").write_text("{}")
            else:
                assert cli.main(words) == 0
        elif module.endswith("measure.py"):
            assert measure.main(words) == 0
        else:
            self._train(words)

    def _train(self, words):
        """Each written model is a little further from the first one's weights."""
        base = Path(words[words.index("--hf-model" if "--hf-model" in words else "--model") + 1])
        out = words[words.index("--save-hf" if "--save-hf" in words else "--out") + 1]
        for scale, path in ((0.01, f"{out}-step-2"), (0.02, out)):
            shutil.copytree(base, path, dirs_exist_ok=True)
            (file,) = Path(path).glob("*.safetensors")
            generator = torch.Generator().manual_seed(len(out))
            moved = {
                n: t + scale * torch.randn(t.shape, generator=generator)
                for n, t in load_file(file).items()
            }
            save_file(moved, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out, runner = tmp_path_factory.mktemp("compare"), StandIns()
    with pytest.MonkeyPatch.context() as patch:
        chosen = ("sft", "rft", "grpo", "es", "es+anchor")
        patch.setattr(compare, "METHODS", {n: methods.METHODS[n] for n in chosen})
        patch.setattr(compare, "missing", lambda method: None)
        # A random model's answers are of any form and length.
        anything = ("--verifier", "regex", "--pattern", "^", "--threshold", "0")
        quick = {**sizes.QUICK.__dict__, "verifier": anything, "es_prompts": 8}
        patch.setattr(sizes, "QUICK", sizes.Settings(**quick))
        argv = ["--quick", "--out", str(out)]
        assert compare.main(argv, runner) == 0
        again = StandIns()
        assert compare.main(argv, again) == 0
        yield out, runner, again


def test_the_report_holds_every_methods_curve(toy):
    out, runner, again = toy
    found = json.loads((out / "RESULTS.json").read_text())
    assert list(found["curves"]) == ["sft", "rft", "grpo", "es", "es+anchor"]
    for name, by_seed in found["curves"].items():
        assert [cell["step"] for cell in by_seed[0]] == (
            [1, 2] if name.startswith("es") else [2, 4]
        )
        for cell in by_seed[0]:
            assert sum(cell["layers"].values()) == pytest.approx(float(cell["relative_norm"] > 0))
            assert sum(cell["modules"].values()) == pytest.approx(float(cell["relative_norm"] > 0))
    sft = found["curves"]["sft"][0]
    assert 0 < sft[0]["relative_norm"] < sft[1]["relative_norm"] and sft[1]["kl_task"] > 0
    assert found["tables"]["end"]["sft"]["relative_norm"]["mean"] == sft[1]["relative_norm"]
    assert found["cosine"]["sft"]["sft"] == pytest.approx(1)
    text = (out / "RESULTS.md").read_text()
    assert "nan" not in text and "None" not in text
    assert (out / "RESULTS.png").read_bytes().startswith(b"\x89PNG")
    assert again.calls == []  # nothing is done twice
    assert runner.calls.count("es") == 2 and runner.calls.count("measure") == 1


def test_the_committed_report_is_what_its_figures_say():
    here = Path(results.__file__).parent
    found = json.loads((here / "RESULTS.json").read_text(encoding="utf-8"))
    assert results.markdown(found) == (here / "RESULTS.md").read_text(encoding="utf-8")


def test_the_command_is_what_gives_the_size():
    for words in ([], ["--seeds", "2", "--population", "4"], ["--quick", "--iterations", "4"]):
        size = sizes.settings_of(sizes.parse("", words))
        assert sizes.command(size).split()[2:] == words


def test_mistakes_are_one_line(capsys):
    for words, said in (
        (["--seeds", "0"], "--seeds: expected 1 or more"),
        (["--iterations", "7"], "--iterations: expected a multiple of 5"),
    ):
        assert compare.main(words) == 2
        assert said in capsys.readouterr().err
