"""Give padded vocabulary rows no probability.

Megatron rounds the vocabulary up so that it divides among the tensor-parallel ranks and leaves the
logits of the added rows in the softmax: zero rows have logit 0, take probability from real tokens,
and make the target probability that DFT weighs with too small.
"""

import torch
from megatron.core.utils import unwrap_model


def valid_columns(width: int, vocab_size: int, rank: int) -> int:
    """How many of the `width` vocabulary columns of tensor-parallel `rank` are real tokens."""
    return min(max(vocab_size - rank * width, 0), width)


class _MaskColumns(torch.autograd.Function):
    """Set logits[..., valid:] to −inf in place; their gradient is zero.

    A plain slice assignment would do, but its backward copies the whole gradient of the logits.
    """

    @staticmethod
    def forward(ctx, logits, valid):
        ctx.valid = valid
        ctx.mark_dirty(logits)
        logits[..., valid:].fill_(float("-inf"))
        return logits

    @staticmethod
    def backward(ctx, grad):
        if not grad.is_contiguous():  # an expanded gradient shares its elements
            grad = grad.contiguous()
        grad[..., ctx.valid :].zero_()
        return grad, None


def mask_padded_vocab(model: torch.nn.Module, vocab_size: int) -> None:
    """Install a forward hook on `model.output_layer` that sets the logits of padded rows to −inf.

    model: a GPTModel (bare or wrapped); chunks without an output layer are left alone. vocab_size:
    the true size, config.json's `vocab_size`. Logits [s, b, V/tp] per rank (or [s, b, V] when
    gathered) are changed in place; their gradient in the padded columns is zero. Nothing happens
    without padding.
    """
    model = unwrap_model(model)
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return
    if vocab_size > model.vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is larger than the model's {model.vocab_size}")

    def hook(module, args, output):
        logits, bias = output
        gathered = logits.shape[-1] == model.vocab_size
        rank = 0 if gathered else model.pg_collection.tp.rank()
        valid = valid_columns(logits.shape[-1], vocab_size, rank)
        if valid == logits.shape[-1]:
            return output
        return _MaskColumns.apply(logits, valid), bias

    layer.register_forward_hook(hook)
