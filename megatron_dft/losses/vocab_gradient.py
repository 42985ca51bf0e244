"""The gradient of softmax statistics with respect to a shard's logits, chunk by chunk.

With p the softmax, q the reference's, y the target, H the entropy, Q = Σp², and g_• the upstream
gradients of log p_y, H, Q, KL(q‖p) and of H̃, the entropy of p̃, the k likeliest renormalised:

    dz = g_l (onehot − p) − g_H p (log p + H) + 2 g_Q p (p − Q) + g_K (p − q) − g_T p̃ (log p̃ + H̃)
"""

import dataclasses

import torch
from torch import Tensor

from megatron_dft.losses.vocab_statistics import (
    LOWEST,
    Finished,
    Wanted,
    mixed_reference,
    target_position,
)


@dataclasses.dataclass
class LogitGradient:
    """Merged statistics [T] and upstream gradients, from which any chunk's gradient follows without
    a collective."""

    done: Finished
    target_T: Tensor
    vocab_start: int
    top_count_T: Tensor | None  # how many of the k likeliest tokens this shard holds
    # Set where the forward left e^{z−m} in the logits' place, m being the shard's own maximum.
    shard_maximum_T: Tensor | None = None
    upstream: tuple[Tensor | None, ...] = ()
    reference_share: float = 1.0  # of Wanted

    @classmethod
    def of(
        cls,
        done: Finished,
        gathered_SCT: Tensor,
        want: Wanted,
        rank: int,
        target_T: Tensor,
        vocab_start: int,
    ) -> "LogitGradient":
        """From `finish(merge(gathered))`; this rank's shard is number `rank` of `gathered`."""
        count = None
        if want.top_k:
            top = gathered_SCT[:, want.rows()["top"]].flatten(0, 1)
            chosen = top.topk(want.top_k, dim=0).indices
            count = (chosen // want.top_k == rank).sum(0)
        share = want.reference_share
        return cls(done, target_T, vocab_start, count, reference_share=share)

    def set_upstream(self, log_prob, entropy, entropy_top, sum_sq_prob, kl) -> None:
        """Upstream gradients [T] of each statistic, None where there is none."""
        self.upstream = (log_prob, entropy, entropy_top, sum_sq_prob, kl)

    def chunk(
        self, logits_TV: Tensor, rows: slice, buffer_TV: Tensor, reference_TV: Tensor | None
    ) -> Tensor:
        """Gradient of a chunk of logits, in `buffer_TV` (statistics dtype, overwritten).

        With `shard_maximum_T` the chunk holds e^{z−m} and is its own buffer.
        """
        grads = [g if g is None else g[rows].to(buffer_TV.dtype) for g in self.upstream]
        g_log_prob, g_entropy, g_top, g_sq, g_kl = grads
        done = self.done
        tokens, vocab = logits_TV.shape
        if vocab == 0:
            return buffer_TV
        maximum, sum_exp = done.maximum[rows], done.sum_exp[rows]
        # First what needs the logits: the buffer may be their own storage.
        if g_kl is not None:
            assert reference_TV is not None
            reference_TV = mixed_reference(logits_TV, reference_TV, self.reference_share)
        if g_top is not None:
            assert done.top_prob is not None
            top = logits_TV.topk(min(len(done.top_prob), vocab), dim=-1)
        if self.shard_maximum_T is None:
            torch.sub(logits_TV, maximum.unsqueeze(1), out=buffer_TV)
        # dz = p·(a + b·log p + c·p) + terms at single tokens − g_K q
        a = torch.zeros_like(maximum)
        if g_log_prob is not None:
            a -= g_log_prob
        if g_kl is not None:
            a += g_kl
        if g_entropy is not None:
            assert done.entropy is not None
            a -= g_entropy * done.entropy[rows]
        if g_sq is not None:
            assert done.sum_sq_prob is not None
            a -= 2.0 * g_sq * done.sum_sq_prob[rows]
        if self.shard_maximum_T is not None:
            shard_maximum = self.shard_maximum_T[rows]
            a = a * torch.where(shard_maximum == -torch.inf, 0.0, (shard_maximum - maximum).exp())
            gradient = logits_TV.mul_((a / sum_exp).unsqueeze(1))
        elif g_entropy is None and g_sq is None:
            gradient = buffer_TV.exp_().mul_((a / sum_exp).unsqueeze(1))
        else:
            gradient = self._mixed(buffer_TV, sum_exp, a, g_entropy, g_sq)
        if g_kl is not None:
            assert reference_TV is not None and done.ref_maximum is not None
            assert done.ref_sum_exp is not None
            q = torch.sub(reference_TV, done.ref_maximum[rows].unsqueeze(1)).to(buffer_TV.dtype)
            q.exp_().mul_((g_kl / done.ref_sum_exp[rows]).unsqueeze(1))
            gradient.sub_(q)
        if g_top is not None:
            self._add_top(gradient, top.values, top.indices, rows, g_top)
        if g_log_prob is not None:
            held, column = target_position(self.target_T[rows], self.vocab_start, vocab)
            each = torch.arange(tokens, device=column.device)
            gradient[each, column] += torch.where(held, g_log_prob, 0.0)
        return gradient

    @staticmethod
    def _mixed(shifted_TV, sum_exp_T, a_T, g_entropy_T, g_sq_T) -> Tensor:
        log_prob = shifted_TV.sub_(sum_exp_T.log().unsqueeze(1)).clamp_(min=LOWEST)
        prob = log_prob.exp()
        factor = log_prob  # in place: the chunk's second and last temporary
        if g_entropy_T is None:
            factor.zero_()
        else:
            factor.mul_(-g_entropy_T.unsqueeze(1))
        if g_sq_T is not None:
            factor.addcmul_(prob, 2.0 * g_sq_T.unsqueeze(1))
        return factor.add_(a_T.unsqueeze(1)).mul_(prob)

    def _add_top(self, gradient_TV, top_logits_Tk, top_columns_Tk, rows, g_top_T) -> None:
        done, count = self.done, self.top_count_T
        assert done.top_prob is not None and done.entropy_top is not None and count is not None
        # The shard's members of the overall k are its own largest; among equal logits any will do.
        position = torch.arange(top_logits_Tk.shape[1], device=count.device)
        mine = position < count[rows].unsqueeze(1)
        here = Finished(
            done.maximum[rows],
            done.sum_exp[rows],
            done.log_prob[rows],
            done.is_top1[rows],
            top_prob=done.top_prob[:, rows],
            entropy_top=done.entropy_top[rows],
        )
        term = top_term(here, top_logits_Tk.t().to(gradient_TV.dtype), g_top_T).t()
        term = torch.where(mine, term, 0.0)
        gradient_TV.scatter_add_(1, top_columns_Tk, term)


def top_term(done: Finished, top_logits_kT: Tensor, g_top_T: Tensor) -> Tensor:
    """−g_T p̃ (log p̃ + H̃) [k, T] of a shard's k largest logits, were all among the k likeliest."""
    assert done.top_prob is not None and done.entropy_top is not None
    # The likeliest token's p̃ is e^0 / Σ.
    log_prob = (top_logits_kT - done.maximum + done.top_prob[0].log()).clamp(min=LOWEST)
    return -g_top_T * log_prob.exp() * (log_prob + done.entropy_top)
