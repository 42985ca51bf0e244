"""Megatron's model config for this run: Hugging Face weights in, hooks on the loss."""

from typing import Any

import torch
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_dft.compat import moe_losses
from megatron_dft.compat.checkpointing import checkpoint_exists
from megatron_dft.compat.loop import separate_mtp_losses
from megatron_dft.flags.megatron import has_router_loss
from megatron_dft.flags.settings import settings
from megatron_dft.hf.config import apply_to_model_config
from megatron_dft.hf.keys import with_te_keys
from megatron_dft.hf.load import load_hf_weights
from megatron_dft.hf.padding import mask_padded_vocab
from megatron_dft.lens.run import Lens, is_wanted
from megatron_dft.step.logits_probe import LogitsProbe
from megatron_dft.step.self_test import SelfTest
from megatron_dft.storage import terminal
from megatron_dft.storage.dtypes import WORDS, trained_word
from megatron_dft.training import fake_quantize
from megatron_dft.training.reference_model import ReferenceModel


class ModelHandle:
    """The model chunks of this rank, once they are built; `pretrain` does not return them."""

    def __init__(self, args: Any) -> None:
        self.chunks: list[Any] = []
        self.lens = Lens(args)


def model_config(args: Any, handle: ModelHandle) -> GPTModelConfig:
    """GPTModelConfig from Megatron's args; what this project adds are hooks on the built model."""
    if args.mtp_num_layers:
        separate_mtp_losses()
    if args.num_experts and has_router_loss(args):
        moe_losses.install()
    config = gpt_config_from_args(args)
    checkpoint = settings().checkpoint
    if args.transformer_impl == "local":
        config.transformer_layer_spec = _local_layer_spec
    if checkpoint is not None:
        apply_to_model_config(config, checkpoint)

    def before_wrapping(chunks: list[Any]) -> list[Any]:
        prepare(chunks, args)
        handle.lens.track(chunks, settings().vocab_size or args.padded_vocab_size)
        if settings().reference_checkpoint is not None:
            _build_reference(config, chunks)
        return chunks

    def after_wrapping(chunks: list[Any]) -> list[Any]:
        handle.chunks = chunks
        return chunks

    config.pre_wrap_hooks.append(before_wrapping)
    config.post_wrap_hooks.append(after_wrapping)
    return config


def _local_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """Megatron's local spec; its checkpoints load whole into the Transformer Engine spec."""
    return with_te_keys(default_layer_spec(config, vp_stage), config.transformer)


def _build_reference(config: GPTModelConfig, chunks: list[Any]) -> None:
    """Hang the frozen model on this rank's chunk as `dft_reference`; step/ runs it."""
    chosen = settings()
    assert chosen.reference_checkpoint is not None and len(chunks) == 1
    chunk = unwrap_model(chunks[0])
    builder = config.get_builder_cls()(config)
    vocab_size = chosen.vocab_size or chunk.vocab_size
    chunk.dft_reference = ReferenceModel(builder, chunk, chosen.reference_checkpoint, vocab_size)
    terminal.say_once(
        f"> reference model {chosen.reference_checkpoint.name}: "
        f"{chunk.dft_reference.bytes / 2**20:,.1f} MiB of frozen weights on each rank like this one"
    )


def prepare(chunks: list[Any], args: Any) -> None:
    """Weights, padded vocabulary, accuracy and the self-test, on the bare model chunks."""
    chosen = settings()
    resumes = checkpoint_exists(args.load)
    if chosen.checkpoint is not None and (is_wanted(args) or not resumes):
        terminal.say_once(f"> reading the weights of {chosen.checkpoint.name} ...")
        load_hf_weights(chunks, chosen.checkpoint)
    if args.qat is not None:
        for chunk in chunks:
            fake_quantize.insert(unwrap_model(chunk), args.qat)
    for chunk in (unwrap_model(c) for c in chunks):
        if not chunk.post_process:
            continue
        if chosen.vocab_size is not None:
            mask_padded_vocab(chunk, chosen.vocab_size)
        LogitsProbe(chunk, chosen.objective, args.dft_mtp, chosen.route.own)
        dtype = WORDS[trained_word(args)]
        vocab_size = chosen.vocab_size or args.padded_vocab_size
        test = SelfTest(
            chunk, chosen.objective, vocab_size, dtype, not args.no_packing, args.kl_coeff
        )
        error = test.run(chunked=chosen.route.head)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            terminal.say(f"> {chosen.route.line}")
            terminal.say(
                f"> self-test: the gradient of --loss {chosen.objective.name} is the formula's "
                f"(relative error {error:.1e})"
            )
