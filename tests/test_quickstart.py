"""The quickstart: its problems are right, seeded and disjoint; its scores and table are right."""

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import arithmetic  # noqa: E402
import evaluate  # noqa: E402
import table  # noqa: E402

# What each kind's wording means, told apart from the generator's operators.
MEANING = {
    "add add": lambda a, b, c: len([*range(a), *range(b), *range(c)]),
    "add take": lambda a, b, c: len([*range(a), *range(b)][c:]),
    "take add": lambda a, b, c: len([*range(a)][b:]) + c,
    "times add": lambda a, b, c: sum([b] * a) + c,
    "times take": lambda a, b, c: len([0] * b * a) - c,
}


@pytest.fixture(scope="module")
def problems():
    return arithmetic.make_problems(640, 200, seed=1)


def test_every_solution_is_right_line_by_line(problems):
    for problem in problems[0] + problems[1]:
        *lines, last = problem.solution.splitlines()
        assert len(lines) == 2
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right), line  # two operands and a sign: nothing else matches
            assert re.fullmatch(r"\d+ [-+*] \d+ = \d+", line)
        assert last == f"#### {MEANING[problem.kind](*problem.numbers)}"
        assert arithmetic.extract_answer(problem.solution) == problem.answer > 0


def test_the_question_names_the_numbers_in_the_order_of_the_calculation(problems):
    for problem in problems[0] + problems[1]:
        assert tuple(map(int, re.findall(r"\d+", problem.question))) == problem.numbers


def test_train_and_held_out_share_neither_numbers_nor_wording_nor_names(problems):
    train, held_out = problems
    assert not {p.numbers for p in train} & {p.numbers for p in held_out}

    def wordings(part, names, things):
        blank = "|".join([*names, *things, r"\d+"])
        return {re.sub(blank, "_", p.question) for p in part}

    words = arithmetic.TRAIN_NAMES + arithmetic.HELD_OUT_NAMES
    things = arithmetic.TRAIN_THINGS + arithmetic.HELD_OUT_THINGS
    assert len(wordings(train, words, things)) == 20
    assert len(wordings(held_out, words, things)) == 10
    assert not wordings(train, words, things) & wordings(held_out, words, things)
    assert not set(arithmetic.TRAIN_NAMES) & set(arithmetic.HELD_OUT_NAMES)


def test_the_kinds_take_turns_and_no_problem_comes_twice(problems):
    for part in problems:
        assert [p.kind for p in part[:10]] == list(arithmetic.KINDS) * 2
        assert len({(p.kind, p.numbers) for p in part}) == len(part)


def test_the_seed_decides():
    assert arithmetic.make_problems(50, 20, seed=3) == arithmetic.make_problems(50, 20, seed=3)
    assert arithmetic.make_problems(50, 20, seed=3) != arithmetic.make_problems(50, 20, seed=4)


def test_more_problems_than_numbers_are_refused():
    with pytest.raises(ValueError, match=r"--train: expected 0 to \d+ problems, got 100000"):
        arithmetic.make_problems(100_000, 10, seed=1)


def test_the_written_rows_are_conversations(tmp_path, problems):
    path = tmp_path / "x.jsonl"
    arithmetic.write_jsonl(path, problems[1][:5])
    rows = evaluate.read_messages(path)
    assert rows == [p.messages() for p in problems[1][:5]]
    assert [m["role"] for m in rows[0]] == ["system", "user", "assistant"]
    assert all(list(json.loads(line)) == ["messages"] for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 * 4 = 12\n#### 12", 12),
        ("#### 1,234", 1234),
        ("####  $18\nAnything 5", 18),
        ("#### 12.0", 12),
        ("so -7 in all", -7),
        ("first 3, then 12.", 12),
        ("12.5", None),
        ("no number", None),
        ("", None),
        ("#### twelve, that is 12", 12),
        ("#### 4\n#### 9", 9),
    ],
)
def test_answer_extraction(text, answer):
    assert arithmetic.extract_answer(text) == answer


class _Bigram(torch.nn.Module):
    """Logits that depend on the last token alone, so that padding and positions cannot matter."""

    def __init__(self, vocabulary):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator)

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep):
        assert position_ids.max(1).values.tolist() == (attention_mask.sum(1) - 1).tolist()
        logits = self.table[input_ids[:, -logits_to_keep:]]
        return type("Output", (), {"logits": logits})


def test_cross_entropy_counts_each_solution_token_once_whatever_the_batch():
    rng = random.Random(5)
    prompts = [[rng.randrange(11) for _ in range(rng.randint(2, 9))] for _ in range(7)]
    solutions = [[rng.randrange(11) for _ in range(rng.randint(1, 6))] for _ in range(7)]
    model, tokenizer = _Bigram(11), type("Tokenizer", (), {"pad_token_id": 0})
    probabilities = model.table.double().softmax(-1)
    expected = [
        -math.log(probabilities[before][token])
        for prompt, solution in zip(prompts, solutions, strict=True)
        for before, token in zip([prompt[-1], *solution], solution, strict=False)
    ]
    for batch_size in (1, 3, 7):
        nll = evaluate.solution_nll(model, tokenizer, prompts, solutions, batch_size)
        torch.testing.assert_close(nll.double(), torch.tensor(expected).double())


LOG = "\n".join(
    f" iteration {i}/4 | elapsed time per iteration (ms): {ms} | lm loss: 1.0"
    for i, ms in enumerate((90000.0, 2000.0, 4000.0, 3000.0), 1)
)


def _scores(correct, work, name):
    scores = {
        "problems": 200,
        "correct": correct,
        "accuracy": correct / 200,
        "cross_entropy": 1.25,
        "mean_target_probability": 0.625,
        "samples": [{"question": "How many?", "reply": "#### 3"}],
    }
    (work / f"{name}.json").write_text(json.dumps(scores))


@pytest.mark.parametrize(("after", "status"), [(90, 0), (10, 1), (9, 1)])
def test_the_table_says_it_all_and_fails_without_a_gain(
    tmp_path, monkeypatch, capsys, after, status
):
    _scores(10, tmp_path, "before")
    _scores(after, tmp_path, "after")
    (tmp_path / "train.log").write_text(LOG)
    (tmp_path / "train.seconds").write_text("125\n")
    arguments = ["--work", str(tmp_path), "--row-tokens", "768", "--seconds", "600"]
    monkeypatch.setattr(sys, "argv", ["table.py", *arguments])
    assert table.main() == status
    out, err = capsys.readouterr()
    wanted = ["200 held-out", "10 (5.0%)", f"{after} ({after / 2:.1f}%)", "1.250", "0.625"]
    for words in [*wanted, " 256 ", "median of 3 steps", "2 min 05 s", "10 min 00 s", "tuned"]:
        assert words in out
    assert ("no better" in err) == bool(status)
