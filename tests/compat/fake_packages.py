"""Stand-ins of transformer-engine and apex on sys.path: what Megatron looks for, and no kernel."""

from pathlib import Path

_OPTIMIZERS = """
def multi_tensor_applier(*args):
    raise AssertionError("a CUDA kernel was called")
multi_tensor_l2norm = multi_tensor_scale = multi_tensor_scale_tensor = multi_tensor_applier
"""
_FILES = {
    "transformer_engine": {
        "__init__.py": "__version__ = '2.20.2'\n",
        "pytorch/__init__.py": "",
        "pytorch/optimizers.py": _OPTIMIZERS,
    },
    "apex": {"__init__.py": ""},
    "fused_weight_gradient_mlp_cuda": {"__init__.py": "is_apex = True\n"},
}


def write(directory: Path, *names: str) -> Path:
    """Write these packages under `directory`, which then goes on sys.path."""
    for name in names:
        for path, text in _FILES[name].items():
            target = directory / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    return directory
