"""Each kind of verifier on right and wrong answers, and on what would break it."""

import os
import sys
import time
from pathlib import Path

import pytest

from megatron_dft.rollout import sandbox
from megatron_dft.rollout.matching import canonical
from megatron_dft.rollout.verdict import Task, Verdict
from megatron_dft.rollout.verifiers import VerifierSpec, verifying

JUDGES = str(Path(__file__).with_name("judges.py"))
QUESTION = [{"role": "user", "content": "?"}]


def verdicts(pairs, workers=1, **spec):
    """For (text, answer) pairs."""
    tasks = [Task(QUESTION, text, answer) for text, answer in pairs]
    with verifying(VerifierSpec(**spec), workers) as verify_all:
        return verify_all(tasks, lambda done: None)


def rewards(pairs, **spec):
    return [v.reward for v in verdicts(pairs, **spec)]


def test_exact_behind_a_marker():
    pairs = [
        ("1 + 2 = 3\n#### 3", "so\n#### 3"),
        ("#### 4", "3"),
        ("#### 5\nno:\n#### 1,200.0 \nrest", 1200),
        ("#### $3.50.", "3.5"),
        ("it is 3", "3"),
        ("####", "3"),
    ]
    found = verdicts(pairs, kind="exact", marker="####")
    assert [v.reward for v in found] == [1, 0, 1, 1, 0, 0]
    assert found[4].kind == "sample without the marker" and found[4].answer is None
    assert found[2].answer == "1200"


def test_exact_without_a_marker_compares_whole_texts():
    assert rewards([(" yes \n", "yes"), ("Yes", "yes"), ("", "")], kind="exact") == [1, 0, 1]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,234", "1234.0", True),
        ("$5", "5", True),
        ("-0.50", "-.5", True),
        ("1e3", "1000", True),
        ("007", "7", True),
        ("0.0", "-0", True),
        ("1e999999999", "1e999999998", False),
        ("3", "-3", False),
        ("12", "1 2", False),
        ("a", "A", False),
        ("9007199254740993", "9007199254740992", False),
    ],
)
def test_numbers_are_compared_as_numbers(one, other, same):
    assert (canonical(one) == canonical(other)) is same


def test_regex_takes_the_last_match():
    pairs = [("answer: 4. No, answer: 5", "5"), ("five", "5"), ("answer: 5", "the answer: 5")]
    found = verdicts(pairs, kind="regex", pattern=r"answer: (\d+)")
    assert [v.reward for v in found] == [1, 0, 1]
    assert found[1].kind == "sample without a match of --pattern"


def test_a_pattern_that_never_ends_is_ended():
    pairs = [("a" * 40 + "!", "x"), ("aaa", "aaa")]
    found = verdicts(pairs, kind="regex", pattern=r"^(a+)+$", seconds=0.7)
    assert found[0] == Verdict(None, kind="verifier that took longer than 0.7 s")
    assert found[1].reward == 1


def test_mathematics():
    pytest.importorskip("math_verify")
    pairs = [
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"$x^2+2x+1$, that is \boxed{(x+1)^2}", r"x^2 + 2x + 1"),
        (r"\boxed{3}", "4"),
        (r"\boxed{3} no, \boxed{4}", r"long text, hence \boxed{4}"),
        ("I do not know", "4"),
        (r"\boxed{4}", ""),
        (r"\boxed{\{1,2\}}", r"\{2, 1\}"),
    ]
    found = verdicts(pairs, kind="math", seconds=60)
    assert [v.reward for v in found] == [1, 1, 0, 1, 0, None, 1]
    assert found[4].kind == "sample without an answer"
    assert found[5].kind == "reference answer that math-verify cannot parse"
    votes = verdicts(
        [(r"\boxed{\frac{2}{4}}", "1"), (r"\boxed{0.5}", "1"), (r"\boxed{0.51}", "1")],
        kind="math",
        seconds=60,
    )
    assert votes[0].answer == votes[1].answer != votes[2].answer


def test_mathematics_that_would_never_end():
    pytest.importorskip("math_verify")
    pairs = [(r"\boxed{9^{9^{9^{9}}}}", r"9^{9^{9^{8}}}"), (r"\boxed{4}", "4")]
    found = verdicts(pairs, kind="math", seconds=5)
    assert found[0].reward != 1 and found[1].reward == 1


def test_a_users_function():
    assert rewards([("abc", ""), ("", "")], kind="python", function=f"{JUDGES}:length") == [0.3, 0]
    name = "tests.rollout.judges:equal"
    assert rewards([("a", "a"), ("a", "b")], kind="python", function=name) == [1, 0]


def test_a_users_function_that_fails_in_every_way():
    words = ["fine", "crash", "raise", "hang", "nan", "abort", "inf", "none", "text", "numpy", "ok"]
    found = verdicts(
        [(w, "") for w in words], kind="python", function=f"{JUDGES}:moody", seconds=1.0
    )
    kinds = {w: v.kind for w, v in zip(words, found, strict=True)}
    assert kinds == {
        "fine": None,
        "crash": "verifier whose process died",
        "raise": "verifier that raised KeyError",
        "hang": "verifier that took longer than 1 s",
        "nan": "reward that is nan",
        "abort": "verifier whose process died",
        "inf": "reward that is inf",
        "none": "reward that is no number but NoneType",
        "text": "reward that is no number but str",
        "numpy": None,
        "ok": None,
    }
    assert [v.reward for v in found] == [1, *[None] * 8, 0.5, 1]


def test_many_workers_keep_the_order():
    pairs = [("x" * n, "") for n in range(30)]
    found = rewards(pairs, workers=3, kind="python", function=f"{JUDGES}:length")
    assert found == [n / 10 for n in range(30)]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("judges", "expected module:function"),
        ("no.such.module:f", "ModuleNotFoundError"),
        (f"{JUDGES}:no_such", "AttributeError"),
        ("/no/such/file.py:f", "FileNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(function, text):
    with pytest.raises(ValueError, match=text) as caught:
        verdicts([("", "")], kind="python", function=function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"kind": "regex"}, "--verifier regex needs --pattern"),
        ({"kind": "exact", "pattern": "x"}, "--verifier exact does not read --pattern"),
        ({"kind": "python"}, "needs --function"),
        ({"kind": "command"}, "needs --command"),
        ({"kind": "command", "command": "true", "marker": "x"}, "does not read --marker"),
        ({"kind": "exact", "marker": ""}, "--marker"),
        ({"kind": "exact", "seconds": 0}, "--time-limit"),
        ({"kind": "regex", "pattern": "("}, "--pattern"),
        ({"kind": "command", "command": "no-such-program x"}, "expected a program"),
        ({"kind": "command", "command": "'"}, "--command"),
    ],
)
def test_wrong_flags_are_one_line(spec, text):
    with pytest.raises(ValueError, match=text):
        verdicts([("", "")], **spec)


def code(text):
    return f"Here:\n```python\n{text}\n```\nDone."


def run_command(command, *texts, seconds=10.0, memory_mib=512):
    pairs = [(t, {"tests": [1]}) for t in texts]
    return verdicts(pairs, kind="command", command=command, seconds=seconds, memory_mib=memory_mib)


PYTHON = f"{sys.executable} code.txt"


def test_a_commands_exit_status_is_the_reward():
    found = run_command(PYTHON, code("x = 1"), code("import sys; sys.exit(5)"), code("1 / 0"))
    assert [v.reward for v in found] == [1, 0, 0]
    script = 'bash -c \'grep -q Here response.txt && grep -q "\\"tests\\"" answer.txt\''
    assert [v.reward for v in run_command(script, code("x"), "x = 1")] == [1, 0]


def test_a_command_that_hangs_forks_dies_or_takes_too_much():
    texts = [
        code("while True: pass"),
        code("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"),
        code("x = bytearray(1 << 30)"),
        code("open('big', 'wb').write(b'0' * (300 << 20))"),
    ]
    found = run_command(PYTHON, *texts, seconds=2)
    assert [v.reward for v in found] == [0, 0, 0, 0]
    assert found[0].kind == "command that took longer than 2 s"
    assert found[1].kind == "command that was ended by signal 11"
    assert run_command("bash -c no-such-program", "x") == [
        Verdict(None, kind="command that could not be started (127)")
    ]


def test_a_command_sees_no_secret_no_network_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    beacon = tmp_path / "beacon"
    clean = "import os; assert 'MY_TOKEN' not in os.environ and os.getcwd() == os.environ['HOME']"
    late = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(1.0)
    open({str(beacon)!r}, 'w').write('still here')
"""
    net = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    found = run_command(PYTHON, code(clean), code(late))
    assert [v.reward for v in found] == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == []
    if sandbox.isolates():
        started = time.monotonic()
        unreachable = code(f"try:\n  {net}\nexcept OSError as e:\n  assert e.errno == 101, e")
        assert [v.reward for v in run_command(PYTHON, unreachable)] == [1]
        while time.monotonic() - started < 1.2:
            os.sched_yield()
        assert not beacon.exists()


def test_without_namespaces_the_group_is_ended_all_the_same(monkeypatch):
    monkeypatch.setattr(sandbox, "isolates", lambda: False)
    found = run_command(PYTHON, code("x = 1"), code("while True: pass"), seconds=1)
    assert [v.reward for v in found] == [1, 0]
