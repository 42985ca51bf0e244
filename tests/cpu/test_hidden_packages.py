"""--device cpu where Transformer Engine is installed: Megatron must not take its CUDA kernels."""

import importlib
import sys

import pytest

from tests.compat import fake_packages
from tests.ranks import run_ranks


def _clip(directory, runtime_first):
    """Whose norm Megatron clips by; then what the package is after the runtime."""
    sys.path.insert(0, directory)
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    from megatron_dft.cpu import runtime

    if runtime_first:
        runtime.activate()
    importlib.reload(clip_grads)
    is_local = clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    runtime.activate()
    runtime.deactivate()
    return is_local, importlib.import_module("transformer_engine").__version__


def test_the_runtime_hides_it_and_gives_it_back(tmp_path):
    fake_packages.write(tmp_path, "transformer_engine")
    assert run_ranks(_clip, 1, str(tmp_path), True)[0] == (True, "2.20.2")


def test_once_megatron_has_taken_its_kernels_the_runtime_says_so(tmp_path):
    fake_packages.write(tmp_path, "transformer_engine")
    with pytest.raises(RuntimeError, match="transformer_engine"):
        run_ranks(_clip, 1, str(tmp_path), False)
