"""The classes that a checkpoint of Megatron may name, and the words for one that may not.

Megatron 0.16 to main register most of them with torch (megatron/core/safe_globals.py). What is
added here they write and do not list: a pending rerun's call site, and numpy's names of both major
releases.
"""

import io
import pickle
import re
import sys
from typing import Any

import numpy
import torch

from megatron_dft.storage import pickle_scan
from megatron_dft.storage.safe_pickle import Inert, is_class_name

_RECIPES = "transformer_engine.common.recipe"
_REFUSED = re.compile(r"GLOBAL (\S+) (?:was|whose)|unrecognized function (\S+(?: function \S+)?)")
# What `pickle.dumps` of a dict of tensors names, TE's extra state since its release 2.
_IN_EXTRA_STATE = {
    ("builtins", "set"),
    ("builtins", "bytearray"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "_load_from_bytes"),  # Megatron puts a weights_only load in its place
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}


def register() -> None:
    """Tell torch.load(weights_only=True) of them."""
    from megatron.core.rerun_state_machine import Call, Caller
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    multiarray = (numpy._core if hasattr(numpy, "_core") else numpy.core).multiarray
    added: list[Any] = [Call, Caller, frozenset, slice, range]
    added += {type(numpy.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    for package in ("numpy.core", "numpy._core"):  # of numpy 1 and numpy 2
        added.append((multiarray._reconstruct, f"{package}.multiarray._reconstruct"))
        added.append((multiarray.scalar, f"{package}.multiarray.scalar"))
    recipes = sys.modules.get(_RECIPES)  # Megatron has imported it where it is installed
    added += [one for one in vars(recipes).values() if _is_recipe(one)] if recipes else []
    torch.serialization.add_safe_globals(added)


def _is_recipe(value: Any) -> bool:
    return isinstance(value, type) and value.__module__ == _RECIPES


def reason_of(error: BaseException) -> str:
    """Why a file could not be loaded, in one line that says what it asked for."""
    text = " ".join(str(error).split())
    found = _REFUSED.search(text) if isinstance(error, pickle.UnpicklingError) else None
    if found is None:
        return text[:200] or type(error).__name__
    name = found[1] or found[2]
    return (
        f"it names {name}, which no checkpoint of Megatron needs; nothing of it was run. Take the "
        "checkpoint from where you trust"
    )


class _Names(pickle.Unpickler):
    """Builds nothing; raises for the first name that an extra state does not have."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        recipe = module == _RECIPES and is_class_name(name)
        if not (dtype or recipe or (module, name) in _IN_EXTRA_STATE):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not expected")
        return Inert


def unsafe_extra_state(entry: Any) -> str | None:
    """Why a layer must not get this byte entry (a list of one extra state); None where it may.

    TE unpickles a tensor's bytes without restriction. A BytesIO goes through torch.load.
    """
    for state in entry if isinstance(entry, list) else [entry]:
        if isinstance(state, torch.Tensor) and state.numel():
            try:
                # Whatever its dtype: TE takes the bytes.
                content = state.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                pickle_scan.check(content)
                _Names(io.BytesIO(content)).load()
            except Exception as error:  # whatever the stand-in says to what it is given
                return reason_of(error)
    return None
