"""oneDNN picks AMX where the CPU lists it, also where a sandbox forbids its use: then bf16 products
die with SIGILL. Read at the first product, so setting it here is early enough."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
