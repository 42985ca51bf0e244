"""What the fork server of tests/ranks.py imports once, for every rank it hands out."""

import os
import warnings

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import megatron.training.training  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401
