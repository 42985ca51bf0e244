"""Learning rates of which no schedule can be made: one line, flag and remedy."""

from argparse import Namespace

import pytest

from megatron_dft.flags import objective, schedule
from megatron_dft.losses import registry


def args_of(**changes) -> Namespace:
    values = dict(
        skip_train=False, lr=1e-3, min_lr=0.0, lr_warmup_init=0.0, lr_warmup_fraction=None,
        train_iters=5, lr_decay_iters=None, lr_warmup_iters=0, lr_wsd_decay_iters=None,
        train_samples=None, lr_decay_samples=None, lr_warmup_samples=0, lr_wsd_decay_samples=None,
        lr_decay_style="cosine", override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=False,
    )  # fmt: skip
    return Namespace(**values | changes)


SAMPLES = dict(train_iters=None, train_samples=40)
REFUSED = {
    "warm-up of the whole decay": (
        dict(lr_decay_iters=2, lr_warmup_iters=2),
        "--lr-warmup-iters: expected a warm-up shorter than --lr-decay-iters 2, got 2",
    ),
    "warm-up in samples": (
        dict(lr_warmup_samples=41, **SAMPLES),
        "--lr-warmup-samples: expected a warm-up shorter than --train-samples 40, got 41",
    ),
    "negative warm-up": (dict(lr_warmup_iters=-1), "--lr-warmup-iters: expected at least 0"),
    "all of it warm-up": (dict(lr_warmup_fraction=1.0), "--lr-warmup-fraction: expected a share"),
    "least above": (dict(min_lr=2e-3), "--min-lr: expected at most --lr 0.001, got 0.002"),
    "start above": (dict(lr_warmup_init=2e-3), "--lr-warmup-init: expected at most --lr 0.001"),
    "negative": (dict(lr=-1e-3), "--lr: expected a rate of at least 0, got -0.001"),
    "no number": (dict(lr=float("nan")), "--lr: expected a rate"),
    "WSD without its last part": (
        dict(lr_decay_style="WSD"),
        "--lr-wsd-decay-iters: .* from 1 to --train-iters 5, got None",
    ),
    "WSD longer than the run": (
        dict(lr_decay_style="WSD", lr_wsd_decay_samples=41, **SAMPLES),
        "--lr-wsd-decay-samples: .* from 1 to --train-samples 40, got 41",
    ),
    "two schedules": (
        dict(override_opt_param_scheduler=True, use_checkpoint_opt_param_scheduler=True),
        "--override-opt_param-scheduler: contradicts --use-checkpoint-opt_param-scheduler",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what):
    change, said = REFUSED[what]
    with pytest.raises(ValueError, match=said) as refusal:
        schedule.check(args_of(**change))
    assert "\n" not in str(refusal.value)


FINE = (
    {},
    dict(lr_warmup_iters=4),
    dict(lr_warmup_fraction=0.0),
    dict(lr_decay_style="WSD", lr_wsd_decay_iters=5),
    dict(lr_warmup_samples=39, **SAMPLES),
    dict(skip_train=True, lr=None, min_lr=9.0),
)


@pytest.mark.parametrize("change", FINE, ids=str)
def test_what_megatron_can_make_a_schedule_of(change):
    schedule.check(args_of(**change))


@pytest.mark.parametrize(
    ("loss", "mtp", "said"), [("sft", False, "--loss sft gives every"), ("dft", True, "--dft-mtp")]
)
def test_full_weight_where_it_means_nothing(loss, mtp, said):
    args = Namespace(dft_full_weight="template", dft_mtp=mtp)
    with pytest.raises(ValueError, match=f"--dft-full-weight template: .*{said}|{said}"):
        objective._check_full_weight(args, registry.get(loss))
