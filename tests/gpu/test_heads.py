"""The checks of heads.py under pytest; skipped where there is no GPU."""

import pytest
import torch

from tests.gpu.heads import CHECKS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels(name):
    CHECKS[name]()
