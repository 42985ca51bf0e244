"""The table of replaced names says what a run really replaces, and a missing one stops it."""

import inspect
import sys

import pytest

from megatron_dft.compat import WRAPPED
from tests.ranks import run_ranks
from tests.train.launch import flags

# Replaced in a run of its own kind alone.
ELSEWHERE = {
    "torch.cuda:current_device",  # offline conversion
    "megatron.core.models.gpt.gpt_model:process_mtp_loss",  # --mtp-num-layers
    "megatron.training.checkpointing:_load_base_checkpoint",  # --load
    # on a GPU
    "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",
    "megatron.core.models.gpt.gpt_layer_specs:LNImpl",
    "megatron.core.transformer.transformer_block:LayerNormImpl",
    # a router with a loss
    "megatron.core.transformer.moe.router:TopKRouter.attach_and_log_load_balancing_loss",
    "megatron.core.transformer.moe.router:TopKRouter.apply_z_loss",
    "megatron.core.transformer.moe.router:z_loss_func",
}


def _attributes():
    """(module or class, attribute) → value, of every module of Megatron that is loaded."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("megatron."):
            continue
        for attribute, value in list(vars(module).items()):
            found[f"{name}:{attribute}"] = value
            if inspect.isclass(value) and value.__module__ == name:
                for inner, method in list(vars(value).items()):
                    found[f"{name}:{attribute}.{inner}"] = method
    return found


def _changed_by_a_run(argv):
    """Places whose value is ours when a run has ended, and what hooks.py says."""
    from megatron_dft import train
    from megatron_dft.compat import hooks
    from megatron_dft.cpu import runtime

    assert train.main(argv) == 0
    table = {f"{owner.__name__}.{name}" for owner, name, _ in runtime._State.saved}
    ours = set()
    for place, value in _attributes().items():
        function = getattr(value, "__func__", value)
        module = getattr(function, "__module__", None) or type(function).__module__
        code = getattr(function, "__code__", None)
        if code is not None:  # functools.wraps hides the module, not the file
            module = "megatron_dft" if "/megatron_dft/" in code.co_filename else module
        if not str(module).startswith("megatron_dft"):
            continue
        owner, _, path = place.partition(":")
        if f"{owner}.{path}" not in table and path.rsplit(".")[-1] not in {
            t.rsplit(".", 1)[1] for t in table
        }:
            ours.add(place)
    return ours, set(hooks.replaced())


@pytest.fixture(scope="module")
def replaced(tiny_model, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("replaced")
    argv = flags(
        tiny_model,
        chats,
        train_iters=1,
        save=out / "save",
        save_interval=1,
        save_hf=out / "hf",
        kl_coeff=0.1,
        kl_target=0.01,
        l2sp_coeff=0.1,
        log_drift_interval=1,
        keep_last=1,
        use_distributed_optimizer=True,
    )
    ((ours, said),) = run_ranks(_changed_by_a_run, 1, argv, init=False)
    return ours, said


def test_the_table_is_what_a_run_replaces(replaced):
    _, said = replaced
    assert said == set(WRAPPED) - ELSEWHERE


def test_nothing_of_megatron_is_replaced_beside_the_table(replaced):
    ours, said = replaced
    names = {place.partition(":")[2] for place in said}
    # A module that imported a replaced function by name holds the same object under that name.
    beside = {place for place in ours if place.partition(":")[2] not in names}
    assert beside == set()
    assert any(place in ours for place in said)


def _with_a_name_gone(argv):
    import contextlib
    import io

    import megatron.training.training as training

    from megatron_dft import train

    training.training_log_renamed = training.__dict__.pop("training_log")
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        status = train.main(argv)
    return status, text.getvalue()


def test_a_release_without_one_of_the_names_is_refused_at_start(tiny_model, chats):
    ((status, text),) = run_ranks(
        _with_a_name_gone, 1, flags(tiny_model, chats, train_iters=1), init=False
    )
    assert status == 2 and "Traceback" not in text
    assert "megatron.training.training:training_log" in text.strip().splitlines()[-1]
