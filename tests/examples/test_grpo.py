"""examples/compare/grpo.py: what TRL is handed. TRL itself is no requirement of the tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "compare"))

import grpo

from megatron_dft.rollout.prompts import Prompt
from megatron_dft.rollout.verifiers import VerifierSpec, verifying

PROMPTS = [
    Prompt(3, [{"role": "user", "content": "1 + 1 ="}], "2", "f:4"),
    Prompt(5, [{"role": "user", "content": "2 + 2 ="}], "4", "f:6"),
]


def test_rows_are_texts_or_conversations_with_their_number():
    assert grpo.rows(PROMPTS, raw=True)[0] == {"prompt": "1 + 1 =", "number": 3}
    assert grpo.rows(PROMPTS, raw=False)[1] == {"prompt": PROMPTS[1].messages, "number": 5}


def test_a_reward_is_the_verifiers_of_the_rows_own_prompt():
    with verifying(VerifierSpec("exact"), 1) as verify_all:
        reward = grpo.reward(PROMPTS, verify_all)
        texts = ["2", "4", "4"]
        assert reward(completions=texts, number=[3, 3, 5], prompts=[]) == [1.0, 0.0, 1.0]
        chats = [[{"role": "assistant", "content": t}] for t in texts]
        assert reward(completions=chats, number=[5, 5, 3]) == [0.0, 1.0, 0.0]


def test_what_the_verifier_cannot_tell_has_no_reward(tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def broken(text, answer, messages):\n    raise RuntimeError\n")
    spec = VerifierSpec("python", function=f"{judge}:broken")
    with verifying(spec, 1) as verify_all:
        assert grpo.reward(PROMPTS, verify_all)(completions=["x"], number=[3]) == [None]


WORDS = ["--model", "m", "--prompts", "p", "--out", "o", "--steps", "1", "--verifier", "exact"]


def test_without_trl_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert grpo.main(WORDS) == 2
    assert "pip install trl" in capsys.readouterr().err


def test_a_batch_is_whole_groups(capsys):
    with pytest.raises(SystemExit):
        grpo.main([*WORDS, "--batch", "12", "--group", "8"])
    assert "expected a multiple of --group 8" in capsys.readouterr().err
