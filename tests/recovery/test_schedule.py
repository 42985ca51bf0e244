"""A resume with other learning rates or another length: it works, or one line says how."""

from argparse import Namespace

import pytest
from safetensors.torch import load_file

from megatron_dft.compat import hooks
from megatron_dft.recovery import schedule
from megatron_dft.recovery.resume import ResumeError
from tests.recovery.runs import run
from tests.train.launch import flags, run_train, tolerate_exit


def args_of(**changes) -> Namespace:
    """Validated args, as far as the schedule reads them: 6 steps of 4, cosine, 1 of warm-up."""
    values = dict(
        train_iters=6, train_samples=None, global_batch_size=4, lr=1e-3, min_lr=0.0,
        lr_decay_iters=None, lr_decay_samples=None, lr_warmup_iters=1, lr_warmup_samples=0,
        lr_warmup_fraction=None, lr_decay_style="cosine", start_weight_decay=0.01,
        end_weight_decay=0.01, weight_decay_incr_style="constant",
        override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False,
    )  # fmt: skip
    return Namespace(**values | changes)


@pytest.fixture(autouse=True)
def places():
    yield
    hooks.undo()


MATERIAL = {
    "rate": (dict(lr=1e-4), "--lr was 0.001, is 0.0001"),
    "least rate": (dict(min_lr=1e-5), "--min-lr was 0, is 1e-05"),
    "length": (dict(train_iters=8), "--train-iters was 6 steps, is 8 steps"),
    "decay": (dict(lr_decay_iters=9), "--lr-decay-iters was 6 steps, is 9 steps"),
    "style": (dict(lr_decay_style="linear"), "--lr-decay-style was cosine, is linear"),
    "warm-up": (dict(lr_warmup_iters=2), "--lr-warmup-iters was 1 steps, is 2 steps"),
    "share of warm-up": (
        dict(lr_warmup_iters=0, lr_warmup_fraction=0.5),
        "--lr-warmup-fraction: the warm-up was 1 steps, is 3 steps",
    ),
    "batch": (dict(global_batch_size=3), "samples (in steps of --global-batch-size 3)"),
    "samples": (
        dict(train_iters=None, train_samples=32, lr_warmup_samples=4),
        "--train-samples was 24 samples, is 32 samples",
    ),
    "decay of weights": (
        dict(start_weight_decay=0.0, weight_decay_incr_style="linear"),
        "--start-weight-decay was 0.01, is 0; --weight-decay-incr-style was constant, is linear",
    ),
}


@pytest.mark.parametrize("what", MATERIAL)
def test_another_schedule_is_one_line_with_flag_values_and_remedy(what):
    change, said = MATERIAL[what]
    with pytest.raises(ResumeError) as refusal:
        schedule.settle(args_of(**change), schedule.of_args(args_of()), "ckpt (step 2)")
    line = str(refusal.value)
    assert said in line and "\n" not in line and "ckpt (step 2)" in line
    for remedy in ("--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"):
        assert remedy in line


def test_another_batch_is_named_and_not_the_steps_that_are_the_same():
    args = args_of(global_batch_size=8)
    with pytest.raises(ResumeError, match="another schedule: --global-batch-size was 4, is 8, and "
                       "lengths count samples; restore it"):  # fmt: skip
        schedule.settle(args, schedule.of_args(args_of()), "ckpt", 4)
    args = args_of(global_batch_size=8, train_iters=5)
    with pytest.raises(ResumeError, match="was 4, is 8, .*; --train-iters was 6 steps, is 5 steps"):
        schedule.settle(args, schedule.of_args(args_of()), "ckpt", 4)
    args = args_of(global_batch_size=8, lr_decay_style="constant", lr_warmup_iters=0)
    saved = schedule.of_args(args_of(lr_decay_style="constant", lr_warmup_iters=0))
    assert len(schedule.settle(args, saved, "ckpt", 4)) == 1


FREE = {
    "the same": (dict(), dict(), 0),
    "longer at a constant rate": (
        dict(lr_decay_style="constant"),
        dict(lr_decay_style="constant", train_iters=8),
        1,
    ),
    "another least rate at a constant one": (
        dict(lr_decay_style="constant"),
        dict(lr_decay_style="constant", min_lr=1e-4),
        1,
    ),
    "longer behind the decay": (dict(lr_decay_iters=6), dict(lr_decay_iters=6, train_iters=8), 1),
}


@pytest.mark.parametrize("what", FREE)
def test_what_changes_no_rate_goes_on_by_itself(what):
    before, now, lines = FREE[what]
    args = args_of(**now)
    assert len(schedule.settle(args, schedule.of_args(args_of(**before)), "ckpt")) == lines
    assert args.override_opt_param_scheduler == bool(lines)


def test_the_checkpoints_schedule_is_taken_where_it_is_asked_for():
    args = args_of(lr=1e-4, min_lr=1e-5, use_checkpoint_opt_param_scheduler=True)
    assert len(schedule.settle(args, schedule.of_args(args_of()), "ckpt")) == 2
    assert (args.lr, args.min_lr) == (1e-3, 0.0)


def test_it_counts_as_megatrons_scheduler_does():
    """The names and values of Megatron's own state."""
    import megatron.training.training as training
    from megatron.training import global_vars

    for change in ({}, dict(lr_warmup_fraction=0.5, lr_warmup_iters=0), dict(lr_decay_iters=4)):
        args = args_of(
            lr_warmup_init=0.0, lr_wsd_decay_iters=None, lr_wsd_decay_style=None, **change
        )
        optimizer = Namespace(param_groups=[])
        kept, global_vars._GLOBAL_ARGS = global_vars._GLOBAL_ARGS, args
        try:
            theirs = training.get_optimizer_param_scheduler(optimizer).state_dict()
        finally:
            global_vars._GLOBAL_ARGS = kept
        assert schedule.of_args(args_of(**change)) == {
            k: v for k, v in theirs.items() if k != "num_steps"
        }


@pytest.mark.parametrize("distributed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_tenth_of_the_rate_is_a_tenth_of_the_step(distributed, tiny_model, chats, tmp_path):
    """Adam's update is proportional to the rate: moments and weights are the checkpoint's."""
    common = dict(train_iters=3, save=tmp_path / "c", use_distributed_optimizer=distributed)
    saving = flags(
        tiny_model, chats, exit_interval=2, save_interval=2, save_hf=tmp_path / "at",
        save_hf_interval=2, **common,
    )  # fmt: skip
    run_train(1, *saving, before=tolerate_exit)
    common |= dict(load=common.pop("save"))
    run_train(1, *flags(tiny_model, chats, save_hf=tmp_path / "same", **common))
    changed = flags(tiny_model, chats, **common | dict(lr=1e-4, min_lr=1e-4))
    run_train(1, *changed, "--override-opt_param-scheduler", "--save-hf", str(tmp_path / "tenth"))
    at, same, tenth = (
        load_file(tmp_path / name / "model.safetensors") for name in ("at-step-2", "same", "tenth")
    )
    for name, start in at.items():
        whole, part = same[name] - start, tenth[name] - start
        assert whole.norm() > 0
        assert (part - 0.1 * whole).norm() <= 2e-3 * 0.1 * whole.norm(), name


def test_a_refused_resume_builds_no_model(tiny_model, chats, tmp_path):
    saving = dict(save=tmp_path / "c", save_interval=1, train_iters=2, exit_interval=1)
    run_train(1, *flags(tiny_model, chats, **saving), before=tolerate_exit)
    again = flags(tiny_model, chats, load=tmp_path / "c", train_iters=2, lr=1e-4, min_lr=1e-4)
    ended = run(1, *again, status=tmp_path / "status", before=_no_model)
    assert ended.codes == [2] and ended.word == "refused"
    assert "--lr was 0.001, is 0.0001" in ended.texts[0]


def _no_model():
    from megatron_dft.training import model

    def built(*args):
        raise AssertionError("a model was built")

    model.prepare = built
