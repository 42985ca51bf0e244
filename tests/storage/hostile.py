"""Pickles that touch a file where they are loaded, and checkpoints that hold them."""

import io
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEP = "iter_0000001"


class Call:
    """Unpickling it calls `function(*arguments)`; both may be of this class themselves."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self) -> None:  # pickle wants what it shall call to be callable
        raise AssertionError

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _system(mark: Path) -> Any:
    return Call(os.system, f"touch {mark}")


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _code(mark: Path) -> str:
    return f"__import__('pathlib').Path({str(mark)!r}).touch()"


def _hooked(mark: Path) -> Any:
    storage = torch.zeros(1).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    hooks = OrderedDict(a=_system(mark))
    return Call(torch._utils._rebuild_tensor_v2, typed, 0, (1,), (1,), False, hooks)


def _chained(mark: Path) -> Any:
    return Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {mark}")


# name -> what it is made of
PAYLOADS: dict[str, Callable[[Path], Any]] = {
    "os.system": _system,
    "eval": lambda mark: Call(eval, _code(mark)),
    "exec": lambda mark: Call(exec, _code(mark)),
    "getattr of an import": _chained,
    "a pickle in a pickle": lambda mark: Call(pickle.loads, pickle.dumps(_system(mark))),
    "torch's own loader": lambda mark: Call(torch.storage._load_from_bytes, _saved(_system(mark))),
    "a tensor's hooks": _hooked,
    "deep in a list": lambda mark: [{"a": (1, [_system(mark)])}],
    "a dictionary's key": lambda mark: {Call(hash, Call(exec, _code(mark))): 1},
}


def dotted(mark: Path) -> bytes:
    """STACK_GLOBAL with a dotted name reaches through an allowed module into what it imports."""

    def text(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    command = f"touch {mark}".encode()
    argument = b"X" + len(command).to_bytes(4, "little") + command
    return (
        b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93" + argument
        + b"\x85R."
    )  # fmt: skip


def copy_of(source: Path, target: Path) -> Path:
    """A copy of a --save directory without the manifest, as if it came from somewhere else."""
    shutil.copytree(source, target)
    for manifest in target.glob("*/megatron_dft.json"):
        manifest.unlink()
    return target


def table_of(save: Path) -> Any:
    return pickle.loads((save / STEP / ".metadata").read_bytes())


def write_table(save: Path, table: Any, protocol: int = 4) -> None:
    (save / STEP / ".metadata").write_bytes(pickle.dumps(table, protocol))


def replace_entry(save: Path, prefix: str, content: bytes) -> str:
    """Give the last byte entry of that name other bytes; returns the entry's whole name."""
    table = table_of(save)
    index = sorted((i for i in table.storage_data if i.fqn.startswith(prefix)), key=lambda i: i.fqn)
    place = table.storage_data[index[-1]]
    with (save / STEP / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), len(content)
        file.write(content)
    write_table(save, table)
    return index[-1].fqn
