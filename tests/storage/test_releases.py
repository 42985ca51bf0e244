"""What Megatron 0.16 to main writes is read: every byte entry, tensor and common state of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.test_stock_loads import FLAGS, VOCABULARY, printed_flags
from tests.hf.tiny import make_tiny
from tests.patches.checkouts import MIRROR, copy_scripts, sources
from tests.ranks import run_ranks
from tests.storage.test_attacks import _answers
from tests.train.launch import flags, run_train

WRITER = Path(__file__).with_name("release_writer.py")


def _read(directory):
    """(keys of the common state, byte entries, names of tensors) as Megatron's loader has them."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    from megatron_dft.hf import skeleton

    with skeleton.single_process():
        common = dist_checkpointing.load_common_state_dict(directory)
        stored = load_sharded_metadata(directory)
        objects = {k: v for k, v in stored.items() if isinstance(v, ShardedObject)}
        tensors = {k: v for k, v in stored.items() if k not in objects}
        for tensor in tensors.values():
            tensor.data = torch.empty(tensor.local_shape, dtype=tensor.dtype)
        everything = dist_checkpointing.load(
            objects | tensors, directory, validate_access_integrity=False
        )
    assert everything.keys() >= objects.keys() | tensors.keys()
    return sorted(common), common["args"].num_experts, sorted(objects), sorted(tensors)


def _tree(name: str, directory: Path) -> Path:
    source = sources()[name]
    if isinstance(source, Path):
        return source
    directory.mkdir()
    packed = subprocess.run(
        ["git", "-C", str(MIRROR), "archive", source, "megatron"], check=True, capture_output=True
    )
    subprocess.run(["tar", "x", "-C", str(directory)], input=packed.stdout, check=True)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", sources() or [pytest.param("", marks=pytest.mark.skip)])
def test_every_release(name, tmp_path):
    tree, out = _tree(name, tmp_path / "tree"), tmp_path / "out"
    env = os.environ | {"PYTHONPATH": str(tree), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    subprocess.run([sys.executable, WRITER, str(out)], env=env, check=True, capture_output=True)
    common, experts, objects, tensors = run_ranks(_read, 1, str(out), init=False)[0]
    assert {"args", "iteration", "opt_param_scheduler", "optimizer"} <= set(common)
    assert experts == 4 and len(tensors) == 13
    for entry in ("probe.bytes", "probe.stream", "rng_state", "rerun_state", "optimizer.dist"):
        assert any(name.startswith(entry) for name in objects), (entry, objects)


def _stock_saves(tree, source, save):
    """One step of the stock script, saved with its optimizer and random states."""
    from megatron_dft.compat.release import skip_built_helpers
    from megatron_dft.cpu import runtime

    runtime.activate()
    skip_built_helpers()
    script = Path(tree, "pretrain_gpt.py")
    sys.path.insert(0, tree)
    sys.argv = [str(script), *printed_flags(source), *FLAGS, "--save", str(save)]
    sys.argv += ["--save-interval", "1", "--ckpt-format", "torch_dist"]
    sys.argv += ["--make-vocab-size-divisible-by", "8"]
    scope = {"__name__": "__main__", "__file__": str(script)}
    exec(compile(script.read_text(), str(script), "exec"), scope)


@pytest.mark.slow
@pytest.mark.skipif(
    not any("0.19" in one for one in sources()), reason="set MEGATRON_LM_DIRS to a 0.19 checkout"
)
def test_a_checkpoint_of_the_stock_script(tmp_path, chats, data_cache):
    (name,) = [one for one in sources() if "0.19" in one]
    tree = str(copy_scripts(name, tmp_path / "tree"))
    source = make_tiny("qwen2", tmp_path / "hf", vocab_size=VOCABULARY)
    save = tmp_path / "save"
    run_ranks(_stock_saves, 1, tree, source, save, init=False)
    export = ["export", str(save), str(tmp_path / "back"), "--hf-model", str(source)]
    ((status, said),) = run_ranks(_answers, 1, [export], init=False)[0]
    assert status == 0, said
    words = flags(source, chats, train_iters=1, load=save, finetune=True)
    assert len(run_train(1, *words)) == 1
