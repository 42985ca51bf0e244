"""The reward of a model as it is: its answers to prompts, verified."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_dft.rollout.draws import Answer, Backend, Draw, sample_seed
from megatron_dft.rollout.prompts import Prompt, Skips
from megatron_dft.rollout.verdict import Task
from megatron_dft.rollout.verifiers import VerifyAll


class Fitness:
    """Mean reward over prompts and samples; what the verifier cannot tell counts 0, by kind.

    prompts_per_iteration: of all prompts, drawn anew for each iteration from `seed`, the same for
    all its members; 0 takes all. The samples' seeds are the same for all members too.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        backend: Backend,
        verify_all: VerifyAll,
        *,
        samples: int = 1,
        prompts_per_iteration: int = 0,
        seed: int = 1,
    ) -> None:
        self._prompts, self._backend, self._verify_all = prompts, backend, verify_all
        self._samples, self._count, self._seed = samples, prompts_per_iteration, seed
        self.unusual = Skips()

    def __call__(self, iteration: int) -> float:
        draws = [
            Draw(prompt, sample, sample_seed(self._seed, prompt.number, sample))
            for prompt in self._chosen(iteration)
            for sample in range(self._samples)
        ]
        size = self._backend.batch_size
        rewards = [self._rewards(draws[i : i + size]) for i in range(0, len(draws), size)]
        return sum(map(sum, rewards)) / len(draws)

    def _chosen(self, iteration: int) -> Sequence[Prompt]:
        if not self._count or self._count >= len(self._prompts):
            return self._prompts
        return random.Random(f"{self._seed}:{iteration}").sample(self._prompts, self._count)

    def _rewards(self, draws: Sequence[Draw]) -> list[float]:
        tasks, places = [], []
        for results in self._backend.generate(draws):
            for draw, answer in results:
                if isinstance(answer, Answer):
                    tasks.append(Task(draw.prompt.messages, answer.text, draw.prompt.answer))
                    places.append(draw.prompt.where)
                else:
                    self.unusual.add(answer.kind, draw.prompt.where)
        verdicts = self._verify_all(tasks, lambda done: None)
        for verdict, where in zip(verdicts, places, strict=True):
            if verdict.kind is not None:
                self.unusual.add(verdict.kind, where)
        return [verdict.reward or 0.0 for verdict in verdicts]


def usable(prompts: Sequence[Prompt], backend: Backend, kind: str, max_tokens: int) -> list[Prompt]:
    """The prompts that leave room for an answer and can be verified; raises ValueError for none.

    kind: the verifier's.
    """
    room, needs = backend.room(), kind in ("math", "exact", "regex")
    found = [
        p
        for p in prompts
        if (room is None or backend.length(p) + max_tokens <= room)
        and not (needs and p.answer is None)
    ]
    if not found:
        raise ValueError(
            f"--prompts: none of {len(prompts):,} prompts leaves room for --max-tokens "
            f"{max_tokens} in {room} and has the reference answer that --verifier {kind} needs; "
            "name its column, --columns answer=COLUMN"
        )
    return found
