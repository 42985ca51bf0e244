"""Flags of the loss's route: from the logits or from the hidden states, in how much memory."""

import argparse
import dataclasses
import importlib.util
import os
from typing import Any

from megatron_dft.flags.objective import needs_kl
from megatron_dft.losses import kernels, route
from megatron_dft.losses.registry import Objective


@dataclasses.dataclass(frozen=True)
class LossRoute:
    """What the flags come to.

    head           from the hidden states (step/chunked_head.py), else from Megatron's logits
    own            on the logits: our cross entropy in the place of Megatron's
    memory         [bytes] for the head's logits; None: as linear_head_loss chooses
    row_filter     bound on the share of the gradient that is left out; None: nothing is
    line           what the log says of it
    """

    head: bool
    own: bool
    memory: int | None
    row_filter: float | None
    line: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; nothing is parsed or checked."""
    group = parser.add_argument_group("route of the loss")
    group.add_argument(
        "--loss-route",
        choices=("auto", "head", "logits"),
        help="head: from the hidden states, supervised tokens alone; logits: from the output "
        "layer's logits; auto: the faster one whose logits fit --loss-memory. Default: auto on a "
        "GPU, logits on a CPU, head with --loss-chunk-size",
    )
    group.add_argument(
        "--loss-chunk-size",
        type=int,
        metavar="TOKENS",
        help="take the head and hold at most this many tokens' worth of logits at a time; default: "
        "as many as --loss-memory holds",
    )
    group.add_argument(
        "--loss-memory",
        type=float,
        default=1024.0,
        metavar="MIB",
        help="memory for the head's logits; what does not fit is computed again in the backward; "
        "default: %(default)s",
    )
    group.add_argument(
        "--loss-row-filter",
        type=float,
        metavar="BOUND",
        help="the head leaves tokens of the least gradient out of its backward, while they are "
        "together at most this share of the gradient's L1 norm (1e-4, say); default: none",
    )
    group.add_argument(
        "--cross-entropy",
        choices=("auto", "megatron", "vocab-parallel"),
        default="auto",
        help="whose cross entropy the logits go through: Megatron's, or ours, which reads them "
        "once for all statistics and takes their place for the gradient; auto: ours on a GPU",
    )


def check(args: argparse.Namespace, objective: Objective, head_lacks: str | None) -> None:
    """Raise one ValueError for flags that contradict each other, or a head that cannot serve.

    head_lacks: why this model's loss cannot take the head; None where it can.
    """
    given = _head_flag(args)
    if args.loss_chunk_size is not None and args.loss_chunk_size < 1:
        raise ValueError(
            f"--loss-chunk-size: expected at least 1 token, got {args.loss_chunk_size}; "
            "256 is a good start, leave it out for as many as --loss-memory holds"
        )
    if not 0 < args.loss_memory < float("inf"):
        raise ValueError(
            f"--loss-memory: expected MiB above 0, got {args.loss_memory:g}; 1024 is the default"
        )
    bound = args.loss_row_filter
    if bound is not None and not 0 <= bound < 1:
        raise ValueError(
            f"--loss-row-filter: expected a share of at least 0 and below 1, got {bound:g}; 1e-4 "
            "drops a ten-thousandth of the gradient at most"
        )
    if args.loss_route == "logits" and given:
        raise ValueError(f"--loss-route logits: {given} belongs to the head; drop one of the two")
    if given is None:
        return
    if args.cross_entropy != "auto":
        raise ValueError(
            f"--cross-entropy {args.cross_entropy}: has no effect under {given}; drop one of them"
        )
    if args.cross_entropy_loss_fusion:
        raise ValueError(
            f"--cross-entropy-loss-fusion: has no effect under {given}; drop one of them"
        )
    if head_lacks is not None:
        raise ValueError(f"{given}: {head_lacks}; drop the flag")
    if bound is not None and needs_kl(args, objective):
        raise ValueError(
            "--loss-row-filter: its bound is that of a loss in log p alone, got a KL term; drop "
            "one of the two"
        )


def _head_flag(args: argparse.Namespace) -> str | None:
    """The flag that asks for the head by itself."""
    if args.loss_chunk_size is not None:
        return "--loss-chunk-size"
    if args.loss_route == "head":
        return "--loss-route head"
    return "--loss-row-filter" if args.loss_row_filter is not None else None


def kernels_serve(on_cpu: bool) -> bool:
    """Whether the Triton kernels will take this run's tensors."""
    asked = not on_cpu or os.environ.get(kernels.INTERPRETER, "0") == "1"
    return asked and importlib.util.find_spec("triton") is not None


def resolve(
    args: Any, objective: Objective, vocab_size: int, on_cpu: bool, head_lacks: str | None
) -> LossRoute:
    """The route of checked flags.

    vocab_size: with Megatron's padding, of the whole model.
    """
    memory, served = int(args.loss_memory * route.MIB), kernels_serve(on_cpu)
    sizes = route.Sizes(
        tokens=args.micro_batch_size * args.seq_length // args.context_parallel_size,
        vocab=vocab_size // args.tensor_model_parallel_size,
        hidden=args.hidden_size,
        itemsize=2 if args.bf16 or args.fp16 else 4,
        tensor_parallel=args.tensor_model_parallel_size,
        kernels=served,
        per_token=objective.per_token,
        kl=needs_kl(args, objective),
    )
    mine = args.cross_entropy == "vocab-parallel" or (args.cross_entropy == "auto" and served)
    own = mine and not args.cross_entropy_loss_fusion
    allowed = ("head", "logits")
    if _head_flag(args):
        allowed = ("head",)
    elif (
        args.loss_route == "logits"
        or (args.loss_route is None and on_cpu)
        or args.cross_entropy != "auto"
        or args.cross_entropy_loss_fusion
        or args.mtp_num_layers
        or head_lacks is not None
    ):
        allowed = ("logits",)
    chosen = route.choose(sizes, memory, allowed)
    head = chosen.name == "head"
    line = chosen.line()
    if not head:
        line += f", {'our' if own else 'Megatron’s'} cross entropy"
    elif args.loss_chunk_size is not None:
        line = f"loss route: head (supervised tokens only), chunks of {args.loss_chunk_size} tokens"
    bounded = memory if served or args.loss_chunk_size is None else None
    return LossRoute(head, own and not head, bounded if head else None, args.loss_row_filter, line)
