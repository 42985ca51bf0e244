"""What the fork server of tests/ranks.py imports once, for every rank it hands out."""

import os
import warnings

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton's own functions take their interpreted form only if asked to when they are imported;
    # a rank that sets the variable again runs our kernels on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

import megatron.training.training  # noqa: E402, F401
import transformers  # noqa: E402, F401
