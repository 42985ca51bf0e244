"""A resume with another optimizer is one line before a model is built."""

from argparse import Namespace

import pytest

from megatron_dft.recovery import optimizer_state
from megatron_dft.recovery.resume import ResumeError
from tests.recovery.runs import run
from tests.recovery.test_schedule import _no_model, places  # noqa: F401
from tests.train.launch import flags, run_train, tolerate_exit

SAVED = dict(
    optimizer="adam", bf16=False, fp16=False, use_distributed_optimizer=False,
    adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, sgd_momentum=0.9, global_batch_size=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(optimizer="sgd"), "--optimizer was adam, is sgd;"),
        (dict(bf16=True), "--bf16 was off, is on;"),
        (dict(use_distributed_optimizer=True), "--use-distributed-optimizer was off, is on;"),
        (dict(adam_beta1=0.8, adam_eps=1e-6),
         "--adam-beta1 was 0.9, is 0.8; --adam-eps was 1e-08, is 1e-06;"),
    ],
)  # fmt: skip
def test_the_flag_is_named(change, said):
    with pytest.raises(ResumeError) as refusal:
        optimizer_state.check(Namespace(**SAVED | change), SAVED, "ckpt (step 2)")
    assert said in str(refusal.value) and "--no-load-optim" in str(refusal.value)


def test_what_the_state_does_not_hold_is_not_compared():
    optimizer_state.check(Namespace(**SAVED | dict(sgd_momentum=0.1)), SAVED, "ckpt")
    optimizer_state.check(Namespace(**SAVED | dict(bf16=True)), {"optimizer": "adam"}, "ckpt")


def test_a_run_is_refused_and_goes_on_from_its_weights(tiny_model, chats, tmp_path):
    saving = dict(save=tmp_path / "c", save_interval=1, train_iters=2, exit_interval=1)
    run_train(1, *flags(tiny_model, chats, **saving), before=tolerate_exit)
    for given, said in (
        (dict(adam_beta2=0.5), "--adam-beta2 was 0.95, is 0.5"),
        (dict(bf16=True), "--bf16 was off, is on"),
    ):
        again = flags(tiny_model, chats, load=tmp_path / "c", train_iters=2, **given)
        ended = run(1, *again, status=tmp_path / "status", before=_no_model)
        assert ended.codes == [2] and ended.word == "refused"
        assert said in ended.texts[0]
    weights = dict(load=tmp_path / "c", train_iters=2, adam_beta2=0.5, no_load_optim=True)
    ended = run(1, *flags(tiny_model, chats, **weights), status=tmp_path / "status")
    assert ended.codes == [0]
    assert "its learning rates start from the beginning" in ended.texts[0]
