"""What a run's answers are written with and end with: for its exports, and in its checkpoints."""

from typing import Any

import torch.distributed as dist

from megatron_dft.data.dataset import ChatDataset
from megatron_dft.data.end_tokens import end_tokens
from megatron_dft.data.template_defaults import with_defaults
from megatron_dft.data.tokenizer import encoder_spec, load_tokenizer
from megatron_dft.flags.settings import settings
from megatron_dft.hf.companions import TrainedChat


def record(args: Any, train: ChatDataset) -> None:
    """Keep it in Megatron's args, which every checkpoint stores. Collective over all ranks."""
    # The first rank alone reads the data through; the same object everywhere, as Megatron expects.
    box = [_found(args, train) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    args.dft_trained_chat = box[0]


def trained_chat(args: Any) -> TrainedChat | None:
    """What `record` kept, in this run or in the one that saved these args; None: nothing."""
    kept = getattr(args, "dft_trained_chat", None)
    return None if kept is None else TrainedChat(kept["templates"], tuple(kept["end_tokens"]))


def _found(args: Any, train: ChatDataset) -> dict[str, Any]:
    checkpoint = settings().checkpoint
    assert checkpoint is not None
    tokenizer = load_tokenizer(
        checkpoint.path, args.chat_template, trust_remote_code=args.trust_remote_code
    )
    spec = encoder_spec(tokenizer)
    variables = args.chat_template_args or {}
    templates = None
    if args.chat_template or variables:
        templates = {name: with_defaults(t, variables) for name, t in spec.templates.items()}
    return {
        "templates": templates,
        "end_tokens": list(end_tokens(train.conversations.stores)),
    }
