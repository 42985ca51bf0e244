"""Match the tensors of a base and a tuned checkpoint, or say in one line why they do not match."""

from dataclasses import dataclass, field

from megatron_dft.drift.checkpoint import FLOATS, Checkpoint, read_config
from megatron_dft.drift.names import is_buffer, module_type, report_order

_IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


@dataclass
class Match:
    """Tensors present on both sides, in report order, and remarks for the report's reader."""

    names: list[str]
    notes: list[str] = field(default_factory=list)


def _weights(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if not is_buffer(name)]


def _tied_head(checkpoint: Checkpoint) -> list[str]:
    """Stored heads that a tied model ignores when it is loaded."""
    if not read_config(checkpoint.path).get("tie_word_embeddings", False):
        return []
    return [n for n in _weights(checkpoint) if module_type(n) == "head" and n.endswith("weight")]


def _check_configs(base: Checkpoint, tuned: Checkpoint) -> None:
    left, right = read_config(base.path), read_config(tuned.path)
    for key in _IDENTITY:
        if key in left and key in right and left[key] != right[key]:
            raise ValueError(
                f"{tuned.path} is no fine-tuned {base.path}: its {key} is {right[key]!r}, the base "
                f"has {left[key]!r}; give the model that training started from"
            )


def match(base: Checkpoint, tuned: Checkpoint) -> Match:
    """The tensors to compare. Raises ValueError for a missing, extra, reshaped or quantised one."""
    _check_configs(base, tuned)
    notes = []
    dropped = set(_tied_head(base)) | set(_tied_head(tuned))
    if dropped:
        notes.append(f"{', '.join(sorted(dropped))}: tied to the embedding, counted once")
    left = sorted((n for n in _weights(base) if n not in dropped), key=report_order)
    right = {n for n in _weights(tuned) if n not in dropped}
    for side, names in (
        (tuned, [n for n in left if n not in right]),
        (base, sorted(right - set(left))),
    ):
        if names:
            raise ValueError(
                f"{side.path} lacks {len(names)} tensors of its counterpart, such as {names[0]}; "
                "compare checkpoints of one architecture and format (megatron-dft export converts)"
            )
    if not left:
        raise ValueError(f"{base.path} holds no weights")
    for name in left:
        a, b = base.tensors[name], tuned.tensors[name]
        if a.shape != b.shape:
            raise ValueError(
                f"{name} is {list(b.shape)} in {tuned.path}, but {list(a.shape)} in {base.path}; "
                "the architectures differ"
            )
        for side, info in ((base, a), (tuned, b)):
            if info.dtype not in FLOATS:
                raise ValueError(
                    f"{side.path}: {name} is stored as {info.dtype}; drift compares float weights, "
                    "dequantise the model first"
                )
    kinds = {(str(base.tensors[n].dtype), str(tuned.tensors[n].dtype)) for n in left}
    mixed = sorted(k for k in kinds if k[0] != k[1])
    if mixed:
        notes.append(
            f"stored as {mixed[0][0]} in the base and {mixed[0][1]} in {tuned.path}: "
            "part of the update is rounding"
        )
    return Match(left, notes)
