"""Hidden states → token statistics on a GPU; what fits in memory of the logits is kept for the
backward.

Shapes: N hidden rows on this rank, T tokens, n supervised ones, h hidden size, V the weight's rows
on this rank, B a block of them, C rows of statistics.

Logits exist as blocks [n, B] of the vocabulary. The last block, as wide as the memory allows, stays
for the backward, which begins with it; the blocks before it are computed again. All of them: three
products, 12 bytes a logit. Each block's rows of dW are complete in one product, which goes straight
to `main_grad` where Megatron fuses gradient accumulation. d_hidden's reduction over ranks runs
beside the last product. One collective for the statistics.
"""

import dataclasses

import torch
from torch import Tensor

from megatron_dft.losses.kernels.gradient import Upstream, gradient_
from megatron_dft.losses.kernels.merge import finish, merge
from megatron_dft.losses.kernels.products import put_product
from megatron_dft.losses.kernels.shard import statistics_of_shard
from megatron_dft.losses.kernels.target_logit import target_logit
from megatron_dft.losses.linear_recompute import Head, spread_outputs, upstream_of
from megatron_dft.losses.main_grad import main_grad_of, placeholder
from megatron_dft.losses.row_filter import in_place_order
from megatron_dft.losses.vocab_autograd import gather_statistics, world_size

# Columns: the widths with which matrix units and 16-byte accesses have no remainder.
ALIGNED = 128


def aligned(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the weight's rows are cut: `again` are recomputed in the backward, `last` is kept."""

    again: tuple[slice, ...]
    last: slice

    @classmethod
    def of(cls, head: Head, tokens: int, vocab: int, hidden: int, itemsize: int) -> "Blocks":
        """As wide as `head` allows, but at least 128 columns: the memory has room for a second
        buffer (KL) and, with several blocks, for the fp32 sum of d_hidden."""
        # Padding rows fill the last tile of the products: their logits are not read.
        width = min(vocab, aligned(head.real))
        tokens = max(tokens, 1)
        buffers = 1 if head.reference is None or head.reference.is_view else 2
        most = head.most_logits // tokens
        if min(most, head.memory // (itemsize * buffers * tokens)) >= width:
            return cls((), slice(0, width))
        most = min(most, (head.memory - 4 * tokens * hidden) // (itemsize * buffers * tokens))
        size = max(ALIGNED, most // ALIGNED * ALIGNED)
        size = min(size, width)
        rest = width - size
        if not rest:
            return cls((), slice(0, width))
        step = min(size, aligned(-(-rest // -(-rest // size))))
        again = tuple(slice(s, min(s + step, rest)) for s in range(0, rest, step))
        return cls(again, slice(rest, width))


class _Room:
    """Memory of one block's logits [n, B], rows beginning at multiples of 128 elements."""

    def __init__(self, like: Tensor, tokens: int, blocks: Blocks) -> None:
        widest = max(aligned(b.stop - b.start) for b in (*blocks.again, blocks.last))
        self.storage = like.new_empty(tokens * widest)

    def __call__(self, tokens: int, block: slice) -> Tensor:
        columns = block.stop - block.start
        stride = aligned(columns)
        return self.storage[: tokens * stride].view(tokens, stride)[:, :columns]


class KeptStatistics(torch.autograd.Function):
    """(hidden [N, h], weight [V, h], target [T], Head) → log p, top-1, entropy, that of the top
    k, Σp² and KL, [T] or None; the first and the last have gradients."""

    @staticmethod
    def forward(ctx, hidden_Nh: Tensor, weight_Vh: Tensor, target_T: Tensor, head: Head):
        ctx.set_materialize_grads(False)
        rows, want, reference = head.rows, head.want, head.reference
        hidden, target = rows.gather(hidden_Nh), rows.of(target_T).contiguous()
        tokens = len(hidden)
        exact = None
        if hidden.element_size() == 2:
            exact = target_logit(hidden, weight_Vh, target, head.vocab_start, head.real)
        blocks = Blocks.of(head, tokens, len(weight_Vh), hidden.shape[1], hidden.element_size())
        room = _Room(hidden, tokens, blocks)
        seen_room = None
        if reference is not None:
            reference.begin()
            seen_room = None if reference.is_view else _Room(hidden, tokens, blocks)
        found = []
        for block in (*blocks.again, blocks.last):
            z = room(tokens, block)
            torch.mm(hidden, weight_Vh[block].t(), out=z)
            seen = None
            if reference is not None:
                into = None if seen_room is None else seen_room(tokens, block)
                seen = reference.block(block, into)
            real = _real(head, block)
            parts, _, _ = statistics_of_shard(
                z[:, :real],
                target,
                head.vocab_start + block.start,
                want,
                reference_nV=None if seen is None else seen[:, :real],
                exact_n=exact,
            )
            found.append(merge(parts, want) if blocks.again else parts)
        parts = torch.stack(found) if blocks.again else found[0]
        if world_size(head.group) > 1:
            parts = gather_statistics(merge(parts, want), head.group)
        done, ctx.stats = finish(parts, target, want, None)
        ctx.head, ctx.blocks, ctx.target, ctx.exact = head, blocks, target, exact
        # Its attributes (main_grad) are wanted, which a saved tensor need not have.
        ctx.weight = weight_Vh
        ctx.kept = None
        if any(ctx.needs_input_grad):
            ctx.kept = (room, seen)
        if reference is not None:
            reference.end()
        ctx.save_for_backward(hidden_Nh, weight_Vh)
        return spread_outputs(ctx, rows, done)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        hidden_Nh, weight_Vh = ctx.saved_tensors
        upstream, kl = upstream_of(ctx.head.rows, grads, ctx.stats[2])
        backward = _Backward(ctx, hidden_Nh, weight_Vh, upstream.float(), kl)
        d_hidden, d_weight = backward.run()
        del backward  # the logits' memory may serve as the placeholder
        if ctx.needs_input_grad[1] and d_weight is None:
            d_weight = placeholder(ctx.weight)
        return d_hidden, d_weight, None, None


def _real(head: Head, block: slice) -> int:
    """Columns of a block that are no padding."""
    return min(max(head.real - block.start, 0), block.stop - block.start)


class _Backward:
    """The backward, block by block. A second one recomputes what the first has overwritten."""

    def __init__(self, ctx, hidden_Nh, weight_Vh, upstream_n, kl_n) -> None:
        self.head, self.blocks, self.weight = ctx.head, ctx.blocks, weight_Vh
        self.wants_hidden, self.wants_weight = ctx.needs_input_grad[:2]
        self.pending = self.head.rows.start_gather(hidden_Nh)
        self._hidden: Tensor | None = None
        self.tokens = self.rows = ctx.stats.shape[1]
        self.stats, self.target, self.exact = ctx.stats, ctx.target, ctx.exact
        self.upstream = upstream_n.contiguous()
        self.kl = None if kl_n is None else kl_n.float().contiguous()
        self.source: Tensor | None = None
        if self.head.row_filter is not None:
            self._filter()
        kept, ctx.kept = ctx.kept, None
        self.kept = kept is not None
        self.room: _Room = kept[0] if kept else _Room(hidden_Nh, self.tokens, self.blocks)
        self.seen: Tensor | None = kept[1] if kept else None
        self.seen_room: _Room | None = None
        self.main_grad = main_grad_of(ctx.weight, self.head.fuse_main_grad)

    def _filter(self) -> None:
        kept = self.head.row_filter.kept(self.upstream, self.stats[2])
        self.source = source = in_place_order(kept, self.tokens)
        self.rows = len(source)
        self.stats = self.stats.index_select(1, source)
        self.target, self.upstream = self.target[source], self.upstream[source]
        self.exact = None if self.exact is None else self.exact[source]

    def hidden(self) -> Tensor:
        """The rows [n, h] that stay, waited for when they are first needed."""
        if self._hidden is None:
            rows = self.pending()
            self._hidden = rows if self.source is None else rows.index_select(0, self.source)
        return self._hidden

    def run(self) -> tuple[Tensor | None, Tensor | None]:
        """(d_hidden [N, h] reduced over ranks, dW [V, h] unless main_grad has it)."""
        weight, several = self.weight, bool(self.blocks.again)
        d_weight = sums = None
        if self.wants_weight and self.main_grad is None:
            d_weight = torch.empty_like(weight)
            d_weight[self.blocks.last.stop :] = 0.0
        if self.wants_hidden:
            dtype = torch.float32 if several else weight.dtype
            sums = weight.new_empty(self.rows, weight.shape[1], dtype=dtype)
        reduced = None
        order = (self.blocks.last, *self.blocks.again)
        if self.head.reference is not None and self.kl is not None and (several or not self.kept):
            self.head.reference.begin()
        for number, block in enumerate(order):
            gradient = self.gradient(block, self.kept and number == 0)
            if sums is not None:
                put_product(sums, gradient, weight[block], add=number > 0)
                if number == len(order) - 1:
                    # On its way while dW is multiplied.
                    reduced = self.head.rows.start_reduce(self._spread(sums))
            if self.main_grad is not None and self.wants_weight:
                put_product(self.main_grad[block], gradient.t(), self.hidden(), add=True)
            elif d_weight is not None:
                put_product(d_weight[block], gradient.t(), self.hidden(), add=False)
        if self.head.reference is not None:
            self.head.reference.end()
        return None if reduced is None else reduced(), d_weight

    def gradient(self, block: slice, kept: bool) -> Tensor:
        """Gradient [n, B] of a block's logits, where they stood."""
        head, source, seen = self.head, self.source, None
        if kept:
            z, seen = self.room(self.tokens, block), self.seen
        else:
            z, source = self.room(self.rows, block), None
            torch.mm(self.hidden(), self.weight[block].t(), out=z)
        if self.kl is None:
            seen = None
        elif seen is None:
            seen = self._reference(block)
        out, real = z[: self.rows], _real(head, block)
        gradient_(
            out,
            z[:, :real],
            self.target,
            head.vocab_start + block.start,
            head.want,
            self.stats,
            Upstream(self.upstream, kl=self.kl),
            reference_nV=None if seen is None else seen[:, :real],
            exact_n=self.exact,
            source_n=source,
        )
        return out

    def _reference(self, block: slice) -> Tensor:
        """The reference's logits of a block that was not kept."""
        reference = self.head.reference
        if not reference.is_view and self.seen_room is None:
            self.seen = None  # its memory first
            self.seen_room = _Room(self.weight, self.tokens, self.blocks)
        room = None if self.seen_room is None else self.seen_room(self.tokens, block)
        return reference.block(block, room)

    def _spread(self, sums: Tensor) -> Tensor:
        """d_hidden [n, h] in the hidden states' dtype, 0 in rows that were dropped."""
        sums = sums.to(self.weight.dtype)
        if self.source is None:
            return sums
        return sums.new_zeros(self.tokens, sums.shape[1]).index_copy_(0, self.source, sums)
