"""Megatron and torch read a checkpoint without running what it says.

A checkpoint is data of somebody else, and three of its parts are pickles: the table `.metadata`,
the byte entries (arguments, random states, TE's extra states), and `common.pt` of older releases.
torch.distributed.checkpoint reads the first two without restriction. Here every `torch.load` of the
process is `weights_only`, with the classes that Megatron writes, the table is read by
storage/torch_dist.py, and an extra state is looked through before a layer unpickles it. What is
refused is one UnsafeFileError on all ranks.
"""

import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dft.compat.hooks import wrap
from megatron_dft.compat.safe_types import reason_of, register, unsafe_extra_state
from megatron_dft.storage.hard_stop import hard_stop
from megatron_dft.storage.safe_pickle import UnsafeFileError
from megatron_dft.storage.torch_dist import backend, read_table

_LOADING = "megatron.core.dist_checkpointing"
_TORCH = "torch.distributed.checkpoint"
_SECONDS = 600.0  # of CPU time for one entry or file
_FROM = "read_from"  # attribute of a table: the directory that it was read from


def install() -> None:
    """Read checkpoints in no other way from here on. Imports Megatron; may be called again."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    register()
    wrap("torch:load", _weights_only)
    wrap(f"{_TORCH}.filesystem:FileSystemReader.read_metadata", _listed_classes)
    wrap(f"{_TORCH}.default_planner:DefaultLoadPlanner.load_bytes", _named_bytes)
    wrap(f"{_LOADING}.core:maybe_load_config", _checked_config)
    wrap(f"{_LOADING}:load_common_state_dict", _common_state)
    wrap(f"{_LOADING}:load", _together)


def _weights_only(original: Any) -> Any:
    def load(f: Any, map_location: Any = None, *_: Any, mmap: Any = None, **__: Any) -> Any:
        try:
            with hard_stop(_SECONDS):
                return original(f, map_location, weights_only=True, mmap=mmap)
        except OSError:
            raise
        except Exception as error:  # whatever the classes say to what they are given
            where = "" if hasattr(f, "read") else f"{f}: "
            raise UnsafeFileError(where + reason_of(error)) from None

    return load


def _listed_classes(original: Any) -> Any:
    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if args or kwargs:  # one rank's own table, which Megatron does not write
                raise UnsafeFileError(f"{self.path}: a checkpoint with a table for each rank")
            table = read_table(Path(self.path))
        except UnsafeFileError as error:
            # torch logs an Exception with its traceback and looks for other tables.
            raise CheckpointException("read", {0: (error, None)}) from None
        if table.storage_meta is None:
            table.storage_meta = torch.distributed.checkpoint.metadata.StorageMeta()
        table.storage_meta.load_id = self.load_id
        setattr(table, _FROM, Path(self.path))
        return table

    return read_metadata


def _named_bytes(original: Any) -> Any:
    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        try:
            if "_extra_state" in read_item.storage_index.fqn:
                found = unsafe_extra_state(torch.load(value, map_location="cpu"))
                if found is not None:
                    raise UnsafeFileError(found)
                value.seek(0)
            original(self, read_item, value)
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{_place(self, read_item)}: {error}") from None

    return load_bytes


def _place(planner: Any, read_item: Any) -> str:
    """The file and the entry that a planner reads."""
    table, index = planner.metadata, read_item.storage_index
    where = table.storage_data.get(index)
    file = Path(getattr(table, _FROM, "")) / getattr(where, "relative_path", "")
    return f"{file}: the entry {index.fqn!r}"


def _checked_config(original: Any) -> Any:
    def maybe_load_config(checkpoint_dir: str) -> Any:
        backend(Path(checkpoint_dir))
        return original(checkpoint_dir)

    return maybe_load_config


def _common_state(original: Any) -> Any:
    def load_common_state_dict(checkpoint_dir: Any) -> dict[str, Any]:
        try:
            state = original(checkpoint_dir)
            if not isinstance(state, dict):
                raise TypeError(f"it is a {type(state).__name__}, expected a dict")
        except (CheckpointException, LookupError, TypeError, AttributeError, UnsafeFileError) as e:
            raise _one_line(e, checkpoint_dir) or UnsafeFileError(
                f"{checkpoint_dir}: the common state is damaged: {reason_of(e)}"
            ) from None
        return state

    return load_common_state_dict


def _one_line(error: BaseException, directory: Any) -> UnsafeFileError | None:
    """The refusal in an error, which names a file of the directory; None where there is none."""
    if isinstance(error, CheckpointException):
        inner = [_one_line(failure[0], directory) for failure in error.failures.values()]
        return next((one for one in inner if one is not None), None)
    if not isinstance(error, UnsafeFileError):
        return None
    text = str(error)
    return error if str(directory) in text else UnsafeFileError(f"{directory}: {text}")


def _together(original: Any) -> Any:
    """Where one rank cannot load, all of them say so: the others would wait for it."""

    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        loaded, failure, said = None, None, None
        try:
            loaded = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        except (Exception, CheckpointException) as error:
            failure = _one_line(error, checkpoint_dir) or error
            said = str(failure) if isinstance(failure, UnsafeFileError) else reason_of(error)
        everyone = _gather(said, kwargs.get("process_group"))
        if isinstance(failure, UnsafeFileError):
            raise failure from None
        if failure is not None:
            raise failure
        first = next((one for one in everyone if one is not None), None)
        if first is not None:
            raise UnsafeFileError(first)
        return loaded

    return load


def _gather(value: Any, group: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def only_torch_dist() -> None:
    """--load takes torch_dist checkpoints alone, whatever else Megatron finds in a directory."""

    def make(original: Any) -> Any:
        def _get_checkpoint_format(checkpoint_name: str, *args: Any, **kwargs: Any) -> str:
            found = original(checkpoint_name, *args, **kwargs)
            if found != "torch_dist":
                raise UnsafeFileError(
                    f"--load: expected a torch_dist checkpoint, got {checkpoint_name} in the "
                    f"format {found}; convert it with stock Megatron-LM (--ckpt-convert-format "
                    "torch_dist)"
                )
            return found

        return _get_checkpoint_format

    wrap("megatron.training.checkpointing:_get_checkpoint_format", make)
