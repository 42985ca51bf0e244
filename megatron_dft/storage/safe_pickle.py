"""Unpickling that builds the classes of a list and nothing else, whatever the file says.

`pickle.load` calls any function that a file names. Here a name of the list below is what it says;
one of a package that keeps plans and caches of its own in the file becomes an inert stand-in; any
other is a stand-in too, and remembered, so that the file can be refused by what it names.
"""

import collections
import io
import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_dft.storage import pickle_scan
from megatron_dft.storage.hard_stop import hard_stop

# CPU time that a pickle has: this, and a second more for each such number of bytes.
_SECONDS, _BYTES_A_SECOND = 60.0, 1 << 20


class UnsafeFileError(ValueError):
    """A file that names what may not be built, or is not what it should be; one line."""


def _names(module: Any, *names: str) -> dict[tuple[str, str], Any]:
    """Those that this torch has: releases differ in them."""
    return {
        (module.__name__, name): getattr(module, name) for name in names if name in vars(module)
    }


# What torch.distributed.checkpoint's table of a checkpoint is made of, Megatron's plans included.
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,  # of Python 3.13 and later
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **_names(filesystem, "_StorageInfo", "_StoragePrefix"),
    **_names(
        metadata,
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    **_names(
        planner, "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"
    ),
}
# Their classes are never needed to read a tensor, and differ from release to release.
_STAND_INS = ("torch.distributed.", "megatron.", "nvidia_resiliency_ext.", "modelopt.")


def is_class_name(name: str) -> bool:
    """Whether a name can be a class's: no function's, and no dots, which reach into imports."""
    return name.isidentifier() and name.lstrip("_")[:1].isupper()


class Inert:
    """Stands in for a class; takes whatever a pickle does to its instances, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Listed(pickle.Unpickler):
    """Builds what the list has. `foreign`: the names it does not have."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.foreign: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if not (module.startswith(_STAND_INS) and is_class_name(name)):
            self.foreign.append(f"{module}.{name}")
        return Inert


def loads(content: bytes) -> tuple[Any, list[str]]:
    """(what the pickle holds, the names of what it asked for and did not get).

    Raises UnsafeFileError (the reason alone, not the file) where it is no pickle.
    """
    unpickler = _Listed(io.BytesIO(content))
    before = {known: dict(vars(known)) for known in _KNOWN.values() if hasattr(known, "__dict__")}
    try:
        pickle_scan.check(content)
        with hard_stop(_SECONDS + len(content) / _BYTES_A_SECOND):
            value = unpickler.load()
    except Exception as error:  # whatever the classes say to what they are given
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UnsafeFileError(_named(unpickler.foreign) or reason) from None
    finally:
        changed = [known for known, names in before.items() if dict(vars(known)) != names]
        for known in changed:
            _restore(known, before[known])
    if changed:
        raise UnsafeFileError(f"it changes the class {changed[0].__name__}")
    return value, unpickler.foreign


def loads_checked(content: bytes) -> Any:
    """What the pickle holds, of bytes that `loads` found right before."""
    return _Listed(io.BytesIO(content)).load()


def _restore(known: Any, names: dict[str, Any]) -> None:
    """A pickle can set attributes of the classes it names."""
    for name in vars(known).keys() - names.keys():
        delattr(known, name)
    for name, value in names.items():
        if vars(known).get(name) is not value:
            setattr(known, name, value)


def _named(foreign: list[str]) -> str:
    return f"it names {foreign[0]}" if foreign else ""
