"""How a row of the registry is applied: weights are found without autograd, then put on −log p."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_dft.losses.token_stats import Terms, TokenLoss, TokenStats

# Whose probability a weight is a function of: "reference-mass" is prior_mass.py's.
WEIGHT_SOURCES = ("model", "reference", "reference-mass")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One number or word of an objective, and the flag that sets it.

    `name` is the keyword of the objective's function; `low` and `high` are inclusive bounds.
    """

    name: str
    flag: str
    default: float | str
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    def checked(self, value: Any) -> float | str:
        """The value, or ValueError naming the flag."""
        if self.choices:
            if value not in self.choices:
                raise ValueError(
                    f"{self.flag}: expected one of {', '.join(self.choices)}, got {value!r}"
                )
            return str(value)
        number = float(value)
        if not (math.isfinite(number) and self.low <= number <= self.high):
            upper = "" if self.high == math.inf else f" and at most {self.high:g}"
            raise ValueError(
                f"{self.flag}: expected a number of at least {self.low:g}{upper}, got {value}; "
                f"leave it out for the default {self.default:g}"
            )
        return number


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: the function, its paper, its parameters and the statistics it needs.

    `of_prob`: the weight follows from p of the target tokens, so that it may be another model's p.
    `reference_share`: the parameter that says how much of the KL's reference is the reference
    model; the rest is the model itself. `per_pair`: the loss is one of pairs of conversations, by
    whose number its sum is divided.
    """

    function: Callable[..., Terms]
    source: str
    parameters: tuple[Parameter, ...] = ()
    needs: frozenset[str] = frozenset()
    per_conversation: bool = False
    per_batch: bool = False
    of_prob: bool = False
    reference_share: str | None = None
    per_pair: bool = False


class _WeightedTokenLoss(torch.autograd.Function):
    """Reads `value`; its gradient with respect to log_prob is −weight, exactly, also where log_prob
    is −inf (an expression in log_prob would give inf · 0 there)."""

    @staticmethod
    def forward(ctx, log_prob: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (weight,) = ctx.saved_tensors
        return -weight * grads[0], None, None


@dataclasses.dataclass(frozen=True)
class Objective:
    """An entry with its parameters bound: call it with a `TokenStats` to get a `TokenLoss`.

    `weight_from`: whose p the weight is a function of, one of WEIGHT_SOURCES (2606.09396).
    """

    name: str
    entry: Entry
    values: Mapping[str, float | str]
    weight_from: str = "model"

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional TokenStats fields that it needs."""
        if self.weight_from == "model":
            return self.entry.needs
        return self.entry.needs | {"reference_log_prob"}

    @property
    def wants_mass(self) -> bool:
        """Whether `reference_log_prob` is log u of prior_mass.py, not log p."""
        return self.weight_from == "reference-mass"

    @property
    def reference_share(self) -> float:
        """η: KL's reference is softmax((1 − η)·z + η·z_ref), z the model's own logits."""
        name = self.entry.reference_share
        return 1.0 if name is None else float(self.values[name])

    @property
    def settings(self) -> dict[str, float | str]:
        """All that was chosen: the parameters, and whose p where it is not the model's."""
        source = {} if self.weight_from == "model" else {"weight_from": self.weight_from}
        return {**self.values, **source}

    @property
    def signed(self) -> bool:
        """Whether it pushes some tokens down: those of bad answers."""
        return self.entry.per_pair or "reward" in self.needs

    @property
    def per_conversation(self) -> bool:
        """Whether packed data has to come with segment_ids."""
        return self.entry.per_conversation or self.values.get("level") == "sequence"

    @property
    def per_token(self) -> bool:
        """Whether a token's weight follows from that token's statistics alone."""
        return not (self.per_conversation or self.entry.per_batch)

    def terms(self, stats: TokenStats) -> Terms:
        """Weight, value and extra term, 0 where not supervised; no gradient to log_prob."""
        missing = [field for field in sorted(self.needs) if getattr(stats, field) is None]
        if missing:
            raise ValueError(
                f"--loss {self.name}: needs {', '.join(missing)} of each token, got none; "
                "give it in TokenStats"
            )
        clean = stats.supervised_only()
        log_prob = clean.log_prob

        def only_supervised(x: Tensor) -> Tensor:
            return torch.where(clean.mask, x, 0.0)

        weight, value, extra = self._terms_of(clean)
        if stats.full_weight is not None:
            full = stats.full_weight.to(torch.bool)
            weight = torch.where(full, 1.0, weight)
            value = None if value is None else torch.where(full, -log_prob, value)
        weight = only_supervised(weight)
        if value is None:
            # p = 0 has weight 0 and −log p = inf; the limit of p·log p is 0.
            value = torch.where(weight == 0, 0.0, weight * -log_prob)
        return Terms(weight, only_supervised(value), extra)

    def _terms_of(self, clean: TokenStats) -> Terms:
        if self.weight_from == "model":
            return self.entry.function(clean, **self.values)
        assert clean.reference_log_prob is not None
        seen = dataclasses.replace(clean, log_prob=clean.reference_log_prob)
        # A value of its own would be another loss's: of this one it is weight × −log p.
        return self.entry.function(seen, **self.values)._replace(value=None)

    def __call__(self, stats: TokenStats) -> TokenLoss:
        """Per-token loss and weight, both of log_prob's shape."""
        weight, value, extra = self.terms(stats)
        # Garbage at ignored positions must not come back in the backward as 0 · NaN.
        log_prob = torch.where(stats.mask.to(torch.bool), stats.log_prob, 0.0)
        loss = _WeightedTokenLoss.apply(log_prob, weight, value)
        return TokenLoss(loss if extra is None else loss + extra, weight)
