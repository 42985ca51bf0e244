"""The study: its data, its scores against generate, and the whole of it in a toy size."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.launch import weights

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "study"))

import answers
import claims
import corpus
import start
import study


def _claimed(row):
    """(a, b, what the row says the sum is) from the words of an addition."""
    _, a1, a0, _, b1, b0, _ = row["prompt"].split()
    units, tens, hundreds = row["completion"].split()
    return int(a1 + a0), int(b1 + b0), int(hundreds + tens + units)


def test_the_demonstrations_hold_the_wrong_share_and_the_test_none():
    rows = [_claimed(r) for r in corpus.noisy_sums(200, 0.3, seed=2)]
    assert sum(a + b != c for a, b, c in rows) == 60
    wrong = [a + b != c for a, b, c in rows]
    assert wrong != sorted(wrong) and wrong != sorted(wrong, reverse=True)
    tested = [_claimed(r) for r in corpus.clean_sums(500)]
    assert all(a + b == c for a, b, c in tested)
    rows_read = [r for r in corpus.pretraining(3000, 0.2) if r["prompt"].startswith("add")]
    read = [_claimed(r) for r in rows_read]
    assert 0.15 < sum(a + b != c for a, b, c in read) / len(read) < 0.25
    seen = {r[:2] for r in read}
    assert not {t[:2] for t in tested} & (seen | {r[:2] for r in rows})
    assert corpus.noisy_sums(50, 0.3, 2) != corpus.noisy_sums(50, 0.3, 3)


def test_new_facts_are_in_no_pretraining():
    old = {r["prompt"] for r in corpus.pretraining(5000, 0) if r["prompt"].startswith("where")}
    assert len(old) == corpus.OLD_FACTS
    for seed in (1, 2):
        new = [r["prompt"] for r in corpus.new_facts(96, seed)]
        assert len(set(new)) == 96 and not old & set(new)


def test_every_word_is_a_token_and_every_row_fits():
    words = set(corpus.vocabulary())
    texts = [{"prompt": "", "completion": t} for t in corpus.general_text(300, "x")]
    for row in [*corpus.pretraining(2000, 0.1), *corpus.new_facts(50, 1), *texts]:
        tokens = (row["prompt"] + row["completion"]).split()
        assert set(tokens) <= words and len(tokens) + 2 <= corpus.ROW_TOKENS
    for row in corpus.sorting_problems(50):
        assert sorted(row["prompt"].split()[1:-1]) == row["completion"].split()


def test_scores_are_those_of_decoding(tmp_path):
    """greedy against generate; sampled and cross entropy against one forward pass a problem."""
    start.write(tmp_path / "m", 32, 1)
    model, words = answers.load(tmp_path / "m"), start.tokenizer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from uniform, and with answers that end
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    rows = [{"prompt": f"add {a} {b} + 1 2 =", "completion": ""} for a in "0123" for b in "45"]
    for i, row in enumerate(rows):  # half of the "right" answers are what the model says
        ids = words(row["prompt"], return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        row["completion"] = " " + words.decode(said) if i % 2 else " 7 7 7"
    got = answers.score(model, rows)
    greedy, right, nll = [], [], []
    for row in rows:
        ids = words(row["prompt"], return_tensors="pt")["input_ids"]
        target = words(row["completion"])["input_ids"][1:] + [words.eos_token_id]
        said = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
        greedy.append(said == target)
        whole = torch.cat([ids, torch.tensor([target])], dim=1)
        with torch.no_grad():
            log_p = model(whole).logits[0].double().log_softmax(-1)
        chosen = [float(log_p[ids.shape[1] - 1 + i, t]) for i, t in enumerate(target)]
        right.append(math.exp(sum(chosen)))
        nll += [-c for c in chosen]
    assert got["greedy"] == sum(greedy) / len(rows)
    assert got["sampled"] == pytest.approx(sum(right) / len(rows), rel=1e-4)
    assert got["cross_entropy"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_a_verdict_needs_every_seed():
    def table(dft, sft):
        figure = [{"mean": sum(v) / len(v), "values": v} for v in (dft, sft)]
        fields = ("sampled", "greedy", "relative_norm", "kl", "kl_task", "old_facts")
        methods = {m: dict.fromkeys(fields, f) for m, f in zip(("dft", "sft"), figure, strict=True)}
        return {"sums": methods, "facts": methods}

    for dft, sft, verdict in (
        ([3, 3], [1, 2], "yes"),
        ([1, 1], [2, 3], "no"),
        ([1, 3], [2, 2], "unclear"),
    ):
        found = claims.check(table(dft, sft))
        first = next(c for c in found if c["field"] == "sampled")
        assert first["verdict"] == verdict
        assert first["differences"] == [a - b for a, b in zip(dft, sft, strict=True)]
        assert not any("asft" in c["more"] + c["less"] for c in found)  # was not run


def _train(argv):
    from megatron_dft import train

    return train.main(argv)


class _Runner:
    """The study's commands on the fork server and in this process; counts them."""

    def __init__(self):
        self.modules = []

    def __call__(self, module, argv, log):
        self.modules.append(module)
        if module == "megatron_dft.train":
            assert run_ranks(_train, 1, list(argv), init=False) == [0]
        else:
            from megatron_dft import cli

            assert cli.main(list(argv)) == 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    runner = _Runner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "SWEPT", ("dft",))
        assert study.main(["--quick", "--sweep", "1e-4", "--out", str(out)], runner) == 0
        yield out, runner


def _results(out):
    return json.loads((out / "RESULTS.json").read_text())


def _check_cells(results):
    fields = {"greedy", "sampled", "cross_entropy", "relative_norm", "unchanged_bf16", "perplexity"}
    fields |= {"kl", "sorting", "old_facts", "sums"}
    for task in ("sums", "facts"):
        assert set(results["tables"][task]) == {"base", "sft", "dft"}
        for method in results["tables"][task].values():
            assert fields <= set(method)
            for field, figure in method.items():
                assert figure["values"] == [figure["mean"]] and figure["spread"] == 0
                assert math.isfinite(figure["mean"]) and figure["mean"] >= 0, field
            for field in ("greedy", "sampled", "unchanged_bf16", "sorting", "old_facts", "sums"):
                assert 0 <= method[field]["mean"] <= 1
            assert method["perplexity"]["mean"] >= 1


def test_the_report_holds_every_figure(toy):
    out, runner = toy
    results = _results(out)
    _check_cells(results)
    base = weights(out / "base")
    for task in ("sums", "facts"):
        for method in ("sft", "dft"):
            tuned = weights(out / "tuned" / f"{task}-{method}-1")
            moved = sum(float((tuned[n] - base[n]).double().square().sum()) for n in base)
            start_norm = sum(float(base[n].double().square().sum()) for n in base)
            cell = results["tables"][task][method]
            assert cell["relative_norm"]["mean"] == pytest.approx(
                (moved / start_norm) ** 0.5, rel=1e-5
            )
            assert moved > 0
        rates = results["sweep"][task]["dft"]
        assert rates["0.0003"]["sampled"] == cell["sampled"]["mean"]
        assert rates["0.0001"]["sampled"] != cell["sampled"]["mean"]
    text = (out / "RESULTS.md").read_text()
    # two tables of results, three rows of the sweep for each task
    assert text.count("| sft |") == 2 and text.count("| dft |") == 2 + 6 and "nan" not in text
    assert (out / "RESULTS.png").read_bytes().startswith(b"\x89PNG")
    # base and its export; diagnosis, two methods and one swept, drift and retention for each task
    assert len(runner.modules) == 2 + 2 * (1 + 3 + 2)


def test_nothing_is_done_twice_and_no_rate_means_no_drift(toy):
    out, _ = toy
    again = _Runner()
    assert study.main(["--quick", "--sweep", "1e-4", "--out", str(out)], again) == 0
    assert again.modules == []
    still = _Runner()
    assert study.main(["--quick", "--lr", "0", "--out", str(out)], still) == 0
    assert still.modules.count("megatron_dft.train") == 4 and len(still.modules) == 8
    results = _results(out)
    _check_cells(results)
    for methods in results["tables"].values():
        for method in ("sft", "dft"):
            assert methods[method]["relative_norm"]["mean"] == 0
            assert methods[method]["unchanged_bf16"]["mean"] == 1
            assert methods[method]["kl"]["mean"] == 0
            for field in ("greedy", "sampled", "cross_entropy", "perplexity", "old_facts"):
                got, base = (methods[m][field]["mean"] for m in (method, "base"))
                assert got == pytest.approx(base, rel=1e-6), field


def test_a_failed_command_ends_the_study_in_words(tmp_path, capsys):
    def broken(module, argv, log):
        raise study.StepFailed(f"{module} ended with status 3")

    assert study.main(["--quick", "--out", str(tmp_path)], broken) == 1
    assert capsys.readouterr().err == "error: megatron_dft.train ended with status 3\n"
    assert study.main(["--jobs", "0"], broken) == 2
    assert "--jobs: expected 1 or more" in capsys.readouterr().err
