"""Figures are read at log intervals alone, and Megatron's averages stay those of all steps."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dft.losses.report import CROSS_ENTROPY, token_figures
from megatron_dft.training import output


@pytest.fixture
def hooked(monkeypatch):
    monkeypatch.setattr(output.mpu, "get_data_parallel_group", lambda **_: None)
    monkeypatch.setattr(output, "get_tensorboard_writer", lambda: None)
    monkeypatch.setattr(output, "row_filter", lambda: None)
    monkeypatch.setattr(output.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(output.dist, "get_world_size", lambda: 1)

    def make(log_interval, **given):
        args = SimpleNamespace(
            log_interval=log_interval, progress="off", global_batch_size=4, micro_batch_size=1,
            context_parallel_size=1, train_iters=6, tensorboard_dir=None, wandb_project="",
            tensorboard_log_interval=1, **given,
        )  # fmt: skip
        targets = SimpleNamespace(controllers={}, before_log=lambda losses: None)
        return output.Output(args, SimpleNamespace(lens=SimpleNamespace(targets=targets)))

    return make


def _megatron_log(hook, log_interval, skipped=()):
    """What Megatron's training_log does with the losses of six steps; its averages by step."""
    total, advanced, logged = {}, 0, {}
    for step in range(1, 7):
        cross_entropy = torch.full((1, 8), 1.0 / step)
        names, sums = token_figures(
            "dft", cross_entropy, cross_entropy, cross_entropy, torch.ones(1, 8), None
        )
        output.FIGURES.add(names, sums)
        losses = {CROSS_ENTROPY: torch.tensor(1.0 / step)}
        call = {"iteration": step, "skipped_iter": int(step in skipped), "total_loss_dict": total,
                "is_first_iteration": step == 1}  # fmt: skip
        hook._log(losses, call)
        if step not in skipped:
            advanced += 1
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + value
        if step % log_interval == 0 or step == 1:
            logged[step] = {name: float(value) / advanced for name, value in total.items()}
            if step != 1:
                total.clear()
                advanced = 0
    return logged


@pytest.mark.parametrize(
    ("interval", "skipped"), [(1, ()), (2, ()), (3, ()), (2, (2,)), (2, (4, 5)), (3, (4, 6))]
)
def test_every_average_is_that_of_its_steps(hooked, interval, skipped):
    logged = _megatron_log(hooked(interval), interval, skipped)
    assert set(logged) == {1, *range(interval, 7, interval)}
    for figures in logged.values():
        # Each is the same number as the cross entropy, which Megatron has added up itself.
        assert set(figures) == {CROSS_ENTROPY, "dft loss", "dft/mean-weight", "dft/mean-prob"}
        assert figures["dft loss"] == pytest.approx(figures[CROSS_ENTROPY], rel=1e-6)


def test_steps_between_are_not_read(hooked, monkeypatch):
    read = []
    take = output.FIGURES.take
    monkeypatch.setattr(output.FIGURES, "take", lambda group: read.append(1) or take(group))
    _megatron_log(hooked(3), 3)
    assert len(read) == 3  # the first step, the third and the sixth
