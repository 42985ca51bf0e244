"""Which way leads from hidden states to the loss in the least time, and what memory it takes.

Two ways: the *head* (linear_head.py), whose logits need not exist as a whole and which computes
supervised tokens alone, and *logits* (cross_entropy.py), Megatron's output layer followed by ours.
Pure arithmetic of sizes; nothing is measured or imported.
"""

import dataclasses

MIB = 1 << 20
# A Hopper GPU's matrix units and memory, as reached: what decides is their ratio.
FLOPS, BYTES_A_SECOND = 6.0e14, 3.5e12
# Off a GPU, measured as shares of the output layer with Megatron's cross entropy (README.md).
CPU_FORWARD, CPU_RECOMPUTE, CPU_LOGITS = 0.99, 1.4, 1.02


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A micro-batch on one rank. tokens: of all of it, after context parallelism; supervised: the
    share that is expected; vocab: rows of the output layer on this rank; itemsize: bytes of a
    logit; kernels: whether the Triton kernels serve; kl: whether reference logits are computed."""

    tokens: int
    vocab: int
    hidden: int
    itemsize: int
    supervised: float = 1.0
    tensor_parallel: int = 1
    kernels: bool = False
    per_token: bool = True
    kl: bool = False


@dataclasses.dataclass(frozen=True)
class Route:
    """name: "head" or "logits". seconds: the estimate that decided, on a GPU; a share off it.
    bytes: of logits and fp32 sums beyond inputs and gradients. recomputed: share of the logits that
    the backward computes again."""

    name: str
    seconds: float
    bytes: int
    recomputed: float

    def line(self) -> str:
        """What a log says of it."""
        again = f", {self.recomputed:.0%} of them twice" if self.recomputed else ""
        what = "supervised tokens only" if self.name == "head" else "Megatron's logits"
        return f"loss route: {self.name} ({what}{again}), {self.bytes / MIB:.0f} MiB for the logits"


def head(sizes: Sizes, memory: int) -> Route:
    """The linear head within `memory` bytes."""
    rows = max(1, round(sizes.tokens * sizes.supervised))
    buffers = 2 if sizes.kl else 1
    whole = rows * sizes.vocab * sizes.itemsize * buffers
    if not sizes.kernels:
        taken = min(memory, whole)
        forward = sizes.tensor_parallel == 1 and sizes.per_token and not sizes.kl
        forward = forward and sizes.itemsize >= 4
        cost = CPU_FORWARD if forward else CPU_RECOMPUTE
        return Route("head", cost * sizes.supervised, taken, 0.0 if forward else 1.0)
    taken, again = whole, 0.0
    if whole > memory:
        sums = 4 * rows * sizes.hidden
        kept = min(whole, max(memory - sums, rows * 128 * sizes.itemsize * buffers))
        taken, again = kept + sums, 1.0 - kept / whole
    products = (3 + again) * 2.0 * rows * sizes.vocab * sizes.hidden / FLOPS
    passes = (6 + again) * rows * sizes.vocab * sizes.itemsize * buffers / BYTES_A_SECOND
    return Route("head", products + passes, taken, again)


def logits(sizes: Sizes) -> Route:
    """Megatron's output layer over all tokens, and the cross entropy in the logits' place."""
    buffers = 2 if sizes.kl else 1
    whole = sizes.tokens * sizes.vocab * sizes.itemsize * buffers
    if not sizes.kernels:
        return Route("logits", CPU_LOGITS, whole, 0.0)
    products = 6.0 * sizes.tokens * sizes.vocab * sizes.hidden / FLOPS
    return Route("logits", products + 6 * whole / BYTES_A_SECOND, whole, 0.0)


def choose(sizes: Sizes, memory: int, allowed: tuple[str, ...] = ("head", "logits")) -> Route:
    """The fastest of the `allowed` ways whose logits fit in `memory` bytes; where none fits, the
    one that takes least. Of equally fast ways the head.

    >>> sizes = Sizes(tokens=8192, vocab=131072, hidden=4096, itemsize=2, kernels=True)
    >>> choose(sizes, 1024 * MIB).line()
    'loss route: head (supervised tokens only, 56% of them twice), 1024 MiB for the logits'
    >>> choose(sizes, 4096 * MIB, allowed=("logits",)).line()
    "loss route: logits (Megatron's logits), 2048 MiB for the logits"
    """
    if not allowed:
        raise ValueError("--loss-route: expected at least one way that the run allows, got none")
    ways = {"head": head(sizes, memory), "logits": logits(sizes)}
    possible = [ways[name] for name in ("head", "logits") if name in allowed]
    fitting = [way for way in possible if way.bytes <= memory]
    if not fitting:
        return min(possible, key=lambda way: way.bytes)
    return min(fitting, key=lambda way: way.seconds)
