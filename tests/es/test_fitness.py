"""The reward of a model: which prompts, in which batches, and what an odd answer counts."""

import pytest

from megatron_dft.es.fitness import Fitness, usable
from megatron_dft.rollout.draws import Answer, Fault
from megatron_dft.rollout.prompts import Prompt
from megatron_dft.rollout.verdict import Verdict

PROMPTS = [
    Prompt(n, [{"role": "user", "content": "x" * n}], n % 2 or None, f"f:{n + 1}")
    for n in range(12)
]


class Echo:
    """Answers with the prompt's number and the sample's seed; cannot answer number 7."""

    name, whole_batches, batch_size = "echo", True, 5

    def __init__(self):
        self.batches = []

    def length(self, prompt):
        return prompt.number

    def room(self):
        return 20

    def generate(self, draws):
        self.batches.append([(d.prompt.number, d.sample, d.seed) for d in draws])
        yield [
            (
                d,
                Fault("no luck")
                if d.prompt.number == 7
                else Answer(str(d.prompt.number), 1, "stop"),
            )
            for d in draws
        ]


def judge(tasks, tell):
    """number / 100; of 3 it cannot tell."""
    return [
        Verdict(None, kind="odd one") if t.text == "3" else Verdict(int(t.text) / 100)
        for t in tasks
    ]


def test_the_mean_is_over_all_draws_and_what_is_odd_counts_0_by_kind():
    backend = Echo()
    fitness = Fitness(PROMPTS, backend, judge, samples=2)
    assert fitness(0) == pytest.approx(sum(n for n in range(12) if n not in (3, 7)) / 1200)
    assert [len(b) for b in backend.batches] == [5, 5, 5, 5, 4]
    drawn = [d for batch in backend.batches for d in batch]
    assert {(n, s) for n, s, _ in drawn} == {(n, s) for n in range(12) for s in range(2)}
    assert len({seed for *_, seed in drawn}) == 24
    assert dict(fitness.unusual.counts) == {"no luck": 2, "odd one": 2}


def test_an_iterations_prompts_are_the_same_for_all_its_members():
    backend = Echo()
    fitness = Fitness(PROMPTS, backend, judge, prompts_per_iteration=4, seed=3)
    for iteration in (0, 0, 1, 2):
        fitness(iteration)
    first, again, *others = ([n for n, *_ in batch] for batch in backend.batches)
    assert first == again and len(set(first)) == 4
    assert all(sorted(other) != sorted(first) for other in others)


def test_prompts_that_leave_no_room_or_have_no_answer_are_left_out():
    assert [p.number for p in usable(PROMPTS, Echo(), "python", 12)] == list(range(9))
    assert [p.number for p in usable(PROMPTS, Echo(), "exact", 12)] == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="none of 12 prompts leaves room for --max-tokens 21"):
        usable(PROMPTS, Echo(), "python", 21)
