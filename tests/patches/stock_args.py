"""Megatron's parsed flags as the stock script has them, and a micro-batch for its loss."""

import argparse
from enum import Enum

import torch

from megatron_dft.losses import registry

CROSS_ENTROPY = [[0.05, 0.9, 2.5, 7.0], [0.3, 4.0, 1.1, 0.6]]


MASK = [[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]


def plain_loss(loss_mask, output_tensor, model=None):
    """The contract of Megatron's loss_func, written from its documentation."""
    loss = (output_tensor.float() * loss_mask).sum()
    count = loss_mask.sum().to(torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach().clone(), count.float()])}


def flags(*words):
    """Parsed flags, as Megatron's parser has them after ours were added."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    registry.add_arguments(parser, default="sft")
    return parser.parse_args(words)


# name → (flags, weight of −log p, value) in float64; both written from the papers' formulas.
FORMULAS = {
    "dft": ([], lambda p, ce: (p, p * ce)),
    "dft-mix": (["--dft-mix-alpha", "0.3"], lambda p, ce: ((w := 0.3 * p + 0.7), w * ce)),
    "dft-floor": (["--dft-floor", "0.2"], lambda p, ce: ((w := p.clamp(min=0.2)), w * ce)),
    "p-alpha": (["--dft-p-alpha", "0.5"], lambda p, ce: (p**0.5, (1 - p**0.5) / 0.5)),
    "chord-phi": ([], lambda p, ce: (p * (1 - p), p * (1 - p) * ce)),
    "dcr": (["--dft-dcr-tau", "0.5"], lambda p, ce: ((w := p.where(p < 0.5, 1.0)), w * ce)),
    "nll-threshold": (
        ["--dft-threshold", "0.4"],
        lambda p, ce: ((w := (p >= 0.4).double()), w * ce),
    ),
    # The lower median of the five supervised cross entropies is 0.9.
    "talr": ([], lambda p, ce: ((w := (p ** (1 / 0.9)).clamp(min=0.01)), w * ce)),
}


class Scope(Enum):
    attn = 1
    full_iteration = 2


REFUSED = [
    ("fp16_lm_cross_entropy", True),
    ("logits_load_dir", "d"),
    ("logits_save_dir", "d"),
    ("export_kd_teacher_load", "d"),
    ("modelopt_enabled", True),
    ("use_legacy_models", True),
    ("use_mup", True),
    ("overlap_moe_expert_parallel_comm", True),
    ("hybrid_context_parallel", True),
    ("yaml_cfg", "f.yaml"),
    ("cuda_graph_impl", "full_iteration"),
    ("cuda_graph_scope", [Scope.attn, Scope.full_iteration]),
    ("cuda_graph_scope", ["full_iteration"]),
]


ACCEPTED = [
    ("fp16_lm_cross_entropy", False),
    ("logits_load_dir", None),
    ("cuda_graph_impl", "transformer_engine"),
    ("cuda_graph_scope", [Scope.attn]),
    ("cuda_graph_scope", None),
    ("cross_entropy_fusion_impl", "te"),  # of no effect without --cross-entropy-loss-fusion
]


def with_setting(dest, value, *words):
    args = flags(*words)
    setattr(args, dest, value)
    return args
