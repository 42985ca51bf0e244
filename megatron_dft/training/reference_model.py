"""A frozen copy of the base model in the layout of the trained one, for objectives that compare.

iw-sft and psft weigh by π_θ/π_base of the target token, asft and --kl-coeff add KL(π_base ‖ π_θ)
over the whole vocabulary. The copy runs each micro-batch without gradients just before the trained
model does. With pipeline stages its hidden states travel from stage to stage on groups of their
own, so that Megatron's schedule does not know of them.

Shapes per rank: s sequence / context-parallel size (h's s also / tp under sequence parallelism),
b micro-batch, V/tp vocabulary shard, h hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dft.hf.load import load_hf_weights
from megatron_dft.hf.padding import mask_padded_vocab
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.step.batch import MicroBatch


class ReferenceModel:
    """One pipeline stage of the frozen model. Not an nn.Module: it must not join the trained one.

    Args:
        builder: Megatron's model builder of the trained model.
        trained: the bare GPTModel chunk of this rank; gives process groups and stage.
        checkpoint: the base weights. vocab_size: real vocabulary.
    """

    def __init__(
        self, builder: Any, trained: Any, checkpoint: HFCheckpoint, vocab_size: int
    ) -> None:
        trained = unwrap_model(trained)
        self.config = trained.config
        self.module = builder.build_model(
            trained.pg_collection,
            pre_process=trained.pre_process,
            post_process=trained.post_process,
        )
        device = next(trained.parameters()).device
        self.module.to(device).requires_grad_(False).eval()
        load_hf_weights([self.module], checkpoint)
        if self.module.post_process:
            mask_padded_vocab(self.module, vocab_size)
        self._connect(trained.pg_collection.pp)

    @property
    def bytes(self) -> int:
        """Memory that the weights of this stage take."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    def _connect(self, pipeline: dist.ProcessGroup) -> None:
        """Groups of two between neighbouring stages; collective over all ranks."""
        ranks = dist.get_process_group_ranks(pipeline)
        mine = list(zip(ranks, ranks[1:], strict=False))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        self.before = self.after = None
        for first, second in sorted({pair for pairs in every for pair in pairs}):
            group = dist.new_group([first, second])
            if dist.get_rank() == second:
                self.before = (group, first)
            elif dist.get_rank() == first:
                self.after = (group, second)
        self.sending: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, batch: MicroBatch, packed: Any, **route: Any) -> Tensor | None:
        """Run a micro-batch.

        Returns, on the last stage alone: logits [b, s, V/tp], or with labels in `route` what
        GPTModel.forward gives for them. Elsewhere None.
        """
        tokens = batch.tokens
        if self.before is not None:
            self.module.set_input_tensor(self._receive(tokens))
        out = self.module(tokens, batch.position_ids, None, packed_seq_params=packed, **route)
        if self.module.post_process:
            return out
        self._send(out)
        return None

    def _receive(self, tokens: Tensor) -> Tensor:
        length, rows = tokens.shape[1], tokens.shape[0]
        if self.config.sequence_parallel:
            length //= self.config.tensor_model_parallel_size
        hidden = torch.empty(
            length, rows, self.config.hidden_size, dtype=self.config.params_dtype,
            device=tokens.device,
        )  # fmt: skip
        assert self.before is not None
        group, source = self.before
        dist.recv(hidden, src=source, group=group)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        # Not waited for before the next one: the stage behind may still be at an earlier
        # micro-batch.
        if self.sending is not None:
            self.sending[0].wait()
        assert self.after is not None
        group, target = self.after
        hidden = hidden.contiguous()
        self.sending = (dist.isend(hidden, dst=target, group=group), hidden)
