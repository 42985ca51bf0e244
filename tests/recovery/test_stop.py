"""A signal to one rank stops all at the same step, and the run goes on bit-equal."""

import os
import signal
from pathlib import Path

import pytest

from tests.recovery.runs import assert_same_tensors, run
from tests.train.launch import flags

LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {"use_distributed_optimizer": True}),
    "dp2-reshardable": (
        2,
        {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True},
    ),
}


def _signal_last_rank_at_step_2():
    """The last rank alone is asked to stop, in the middle of a step."""
    from megatron_dft.step import forward_step

    plain, calls = forward_step.get_batch, []

    def get_batch(iterator, training):
        batch = plain(iterator, training)
        from megatron.training import get_args

        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            if get_args().curr_iteration == 1 and not calls:
                calls.append(1)
                os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    forward_step.get_batch = get_batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_signal_one_checkpoint_and_a_bit_equal_continuation(
    layout, tiny_model, chats, tmp_path
):
    ranks, extra = LAYOUTS[layout]
    common = dict(loss="dft", train_iters=4, save_interval=100, clip_grad=1.0, **extra)

    def go(name, **more):
        return run(
            ranks,
            *flags(tiny_model, chats, save=tmp_path / name, load=tmp_path / name, **common),
            status=tmp_path / f"{name}.status",
            **more,
        )

    whole = go("whole")
    assert whole.word == "finished" and whole.codes == [0] * ranks
    stopped = go("parts", before=_signal_last_rank_at_step_2)
    assert stopped.codes == [75] * ranks
    assert stopped.word == "stopped"
    assert stopped.texts[0].splitlines()[-1] == (
        f"> stopped as asked: step 2 of 4; checkpoint in {tmp_path / 'parts'}, from which --load "
        "goes on"
    )
    assert [s["step"] for s in stopped.steps] == [1, 2]
    assert [p.name for p in sorted((tmp_path / "parts").glob("iter_*"))] == ["iter_0000002"]
    rest = go("parts")
    assert rest.word == "finished" and rest.codes == [0] * ranks
    assert stopped.steps + rest.steps == whole.steps
    assert stopped.rows | rest.rows == whole.rows and len(stopped.rows) == 2 * ranks
    assert_same_tensors(tmp_path / "whole/iter_0000004", tmp_path / "parts/iter_0000004")
    assert not list(Path(tmp_path).rglob("*.part"))
