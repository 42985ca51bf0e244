"""NaN in a loss or a gradient, at the first step or later: no update, and all ranks stop."""

import os

import pytest

from tests.recovery.runs import run
from tests.train.launch import flags


def _spoil(step, change):
    from megatron.training import get_args

    from megatron_dft.step import loss as step_loss

    plain = step_loss.token_loss

    def token_loss(*args):
        loss, cross_entropy, weight = plain(*args)
        iteration = getattr(get_args(), "curr_iteration", None)  # none yet in the self-test
        if os.environ["RANK"] == "1" and iteration == step - 1:
            loss, cross_entropy = change(loss, cross_entropy, args[0].loss_mask)
        return loss, cross_entropy, weight

    step_loss.token_loss = token_loss


def _nan_loss_at_step_1():
    _spoil(1, lambda loss, cross_entropy, mask: (loss * float("nan"), cross_entropy))


def _nan_gradient_at_step_2():
    # The value is unchanged: √0; its gradient is 0 · ∞.
    _spoil(2, lambda loss, cross_entropy, mask: (loss + (loss * 0).sqrt(), cross_entropy))


def _hidden_infinity_at_step_2():
    """p = 0: DFT's loss and gradient of these tokens are 0."""

    def change(loss, cross_entropy, mask):
        return loss * (1 - mask), cross_entropy.masked_fill(mask.bool(), float("inf"))

    _spoil(2, change)


@pytest.mark.parametrize(
    ("before", "step"),
    [(_nan_loss_at_step_1, 1), (_nan_gradient_at_step_2, 2), (_hidden_infinity_at_step_2, 2)],
)
def test_every_rank_stops_before_the_update(before, step, tiny_model, chats, tmp_path):
    ended = run(
        2,
        *flags(
            tiny_model,
            chats,
            loss="dft",
            train_iters=4,
            save=tmp_path / "c",
            load=tmp_path / "c",
            save_interval=1,
        ),
        status=tmp_path / "status",
        before=before,
    )
    assert ended.codes == [65, 65]
    assert ended.word == "bad-numbers"
    assert [s["step"] for s in ended.steps] == list(range(1, step))
    # Nothing of the bad step is on disk.
    assert len(list((tmp_path / "c").glob("iter_*"))) == step - 1
    # Micro-batches of 2 in turn over two replicas: rank 1 has 2, 3, 6, 7 of each 8.
    samples = [8 * (step - 1) + i for i in (2, 3, 6, 7)]
    reports = [text for text in ended.texts if f"rank 1, step {step}: found" in text.lower()]
    assert reports and f"samples {samples}" in reports[0]
