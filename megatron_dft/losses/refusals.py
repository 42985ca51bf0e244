"""Megatron's settings under which exp(−CE) is something else than p, for every way into the loss.

DFT and its family take p from the cross entropy that Megatron has reduced over the vocabulary
shards. These settings change that number, or compute it where the loss does not look. The flags of
a training run (flags/megatron.py) and a patched Megatron-LM checkout (stock.py) both refuse them,
and each adds what it alone cannot do.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """is_set: whether a value of the setting is refused. why: what it does. remedy: what to do."""

    is_set: Callable[[Any], bool]
    why: str
    remedy: str = "drop it"


def given(value: Any) -> bool:
    """For settings whose default is None."""
    return value is not None


def captures_the_loss(value: Any) -> bool:
    """Whether a CUDA graph of this kind or scope holds the loss function.

    value: Megatron's cuda_graph_impl (a word) or cuda_graph_scope (words or enum members).
    """
    parts = [value] if isinstance(value, str) else value or ()
    return any(getattr(part, "name", part) == "full_iteration" for part in parts)


# argparse dest → refusal. A release that lacks a setting lacks the dest.
NOT_P: dict[str, Refusal] = {
    "fp16_lm_cross_entropy": Refusal(
        bool, "computes the cross entropy in fp16, where exp(-CE) is not p"
    ),
    "logits_load_dir": Refusal(given, "replaces the loss by distillation"),
    "logits_save_dir": Refusal(
        given, "is for distillation teachers", "drop it, or run stock Megatron-LM without --loss"
    ),
    "overlap_moe_expert_parallel_comm": Refusal(
        bool, "takes a schedule that bypasses the model's loss"
    ),
    "use_mup": Refusal(bool, "scales the logits after the output layer"),
    "hybrid_context_parallel": Refusal(
        bool, "has not been proven here", "drop it for --context-parallel-size"
    ),
    "yaml_cfg": Refusal(given, "bypasses the flags", "drop it and give them on the command line"),
    "cuda_graph_impl": Refusal(captures_the_loss, "captures the loss function in a graph"),
    "cuda_graph_scope": Refusal(captures_the_loss, "captures the loss function in a graph"),
}


def flag_of(dest: str) -> str:
    """The usual spelling of an argparse dest: tensor_model_parallel_size → --tensor-model-…"""
    return "--" + dest.replace("_", "-")


def refuse(args: Any, table: Mapping[str, Refusal], loss: str) -> None:
    """Raise one ValueError naming the first setting of the table that is set.

    args: parsed flags (a Namespace). loss: as on the command line, "--loss dft".
    """
    for dest, refusal in table.items():
        value = getattr(args, dest, None)
        if refusal.is_set(value):
            raise ValueError(
                f"{flag_of(dest)}: {refusal.why}; expected it unset under {loss}, got {value}; "
                f"{refusal.remedy}"
            )


def refuse_foreign_cross_entropy(args: Any, loss: str) -> None:
    """Raise ValueError for a fused cross entropy that is not Megatron's own.

    Transformer Engine's before 2.8 ignores the upstream gradient, where the weight is.
    """
    implementation = getattr(args, "cross_entropy_fusion_impl", "native")
    if getattr(args, "cross_entropy_loss_fusion", False) and implementation != "native":
        raise ValueError(
            f"--cross-entropy-fusion-impl: expected native under {loss} (te's older kernels ignore "
            f"the weight in the backward), got {implementation}; use native"
        )
