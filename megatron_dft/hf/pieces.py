"""How a Megatron parameter is put together from Hugging Face tensors, for any tensor-parallel size.

A rule of a family's table says which Hugging Face tensors make one Megatron parameter and how. From
it follow segments: the whole (unsharded) parameter as runs of rows of those tensors, in Megatron's
order; a rank's shard is a window of that list. Import copies the runs in, export copies the same
runs back: one description serves both directions, so a round trip cannot disagree with itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

PADDING = ""  # name of the segment that no Hugging Face tensor fills: padded vocabulary rows


@dataclass(frozen=True)
class Dimensions:
    """What the layouts need of the model.

    groups, queries_per_group, head_width: attention heads; vocabulary: true size, without padding.
    """

    groups: int
    queries_per_group: int
    head_width: int
    vocabulary: int


@dataclass(frozen=True)
class Segment:
    """`length` consecutive rows (or columns, see `Rule.axis`) of tensor `name`, from `start` on."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A run of the tensor `name` from `source` on, lying at `target` of a rank's shard."""

    name: str
    source: int
    target: int
    length: int


# (names, size of the whole parameter along the axis, number of shards, dimensions) -> segments
_Layout = Callable[[tuple[str, ...], int, int, Dimensions], list[Segment]]


@dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    names       Hugging Face names, `{layer}` and `{expert}` to be filled in
    axis        the axis that tensor parallelism cuts; None where every rank holds the whole
    layout      order of the rows in Megatron's parameter; None: the one tensor as it is
    is_copy     this parameter repeats a tensor that another one owns (tied output layer)
    is_optional some layer specs shard this parameter, others hold it whole on every rank
    """

    names: tuple[str, ...]
    axis: int | None = None
    layout: _Layout | None = None
    is_copy: bool = False
    is_optional: bool = False


def replicated(name: str) -> Rule:
    return Rule((name,))


def column_parallel(name: str) -> Rule:
    """Output rows are sharded (Megatron's ColumnParallelLinear)."""
    return Rule((name,), 0)


def column_or_replicated(name: str) -> Rule:
    """Output rows, sharded by the local spec and whole under TE (latent down projections)."""
    return Rule((name,), 0, is_optional=True)


def row_parallel(name: str) -> Rule:
    """Input columns are sharded (Megatron's RowParallelLinear)."""
    return Rule((name,), 1)


def vocabulary(name: str, is_copy: bool = False) -> Rule:
    """Vocabulary rows; Megatron pads their number, no tensor fills the padding."""
    return Rule((name,), 0, _vocabulary, is_copy)


def gated(gate: str, up: str) -> Rule:
    """Each rank holds its rows of the gate, then its rows of the up projection."""
    return Rule((gate, up), 0, _gated)


def qkv(query: str, key: str, value: str) -> Rule:
    """Query group by query group: its query heads, its key head, its value head."""
    return Rule((query, key, value), 0, _qkv)


def packed_gated(name: str) -> Rule:
    """As `gated`, from one tensor that holds all gate rows, then all up rows."""
    return Rule((name,), 0, _packed_gated)


def packed_qkv(name: str) -> Rule:
    """As `qkv`, from one tensor that holds all query rows, then the key rows, then the values'."""
    return Rule((name,), 0, _packed_qkv)


def _vocabulary(names, size, shards, dims) -> list[Segment]:
    if size < dims.vocabulary:
        raise ValueError(
            f"the model's vocabulary has {size} rows, {names[0]} has {dims.vocabulary}; drop "
            "--padded-vocab-size and --vocab-size, --hf-model sets them"
        )
    padding = [Segment(PADDING, 0, size - dims.vocabulary)] if size > dims.vocabulary else []
    return [Segment(names[0], 0, dims.vocabulary), *padding]


def _gated(names, size, shards, dims) -> list[Segment]:
    rows = size // (2 * shards)
    return [Segment(name, rank * rows, rows) for rank in range(shards) for name in names]


def _qkv(names, size, shards, dims) -> list[Segment]:
    query, key, value = names
    many, width = dims.queries_per_group * dims.head_width, dims.head_width
    return [
        segment
        for group in range(dims.groups)
        for segment in (
            Segment(query, group * many, many),
            Segment(key, group * width, width),
            Segment(value, group * width, width),
        )
    ]


def _packed_gated(names, size, shards, dims) -> list[Segment]:
    runs = _gated(("gate", "up"), size, shards, dims)
    base = {"gate": 0, "up": size // 2}
    return [Segment(names[0], base[r.name] + r.start, r.length) for r in runs]


def _packed_qkv(names, size, shards, dims) -> list[Segment]:
    runs = _qkv(("query", "key", "value"), size, shards, dims)
    keys = dims.groups * dims.head_width
    queries = keys * dims.queries_per_group
    base = {"query": 0, "key": queries, "value": queries + keys}
    return [Segment(names[0], base[r.name] + r.start, r.length) for r in runs]


def segments(
    rule: Rule, names: tuple[str, ...], size: int, shards: int, dims: Dimensions
) -> list[Segment]:
    """The whole parameter, `size` long along the rule's axis (axis 0 if it is replicated).

    The runs follow each other without gaps; `names` are the rule's, filled in.
    """
    if rule.layout is None:
        return [Segment(names[0], 0, size)]
    runs = rule.layout(names, size, shards, dims)
    covered = sum(s.length for s in runs)
    if covered != size:
        raise ValueError(
            f"{', '.join(names)}: config.json implies {covered} rows, Megatron built {size}; a "
            "model flag contradicts config.json: remove it"
        )
    return runs


def window(runs: list[Segment], begin: int, end: int) -> list[Piece]:
    """The part of the parameter that lies in `begin:end`, with targets counted from `begin`."""
    pieces, position = [], 0
    for run in runs:
        low, high = max(position, begin), min(position + run.length, end)
        if low < high:
            source = run.start + low - position
            pieces.append(Piece(run.name, source, low - begin, high - low))
        position += run.length
    return pieces
