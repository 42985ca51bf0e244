"""The objectives by name: their papers, parameters and flags.

    from megatron_dft.losses import registry
    from megatron_dft.losses.token_stats import TokenStats
    registry.add_arguments(parser.add_argument_group("objective"))  # --loss, every --dft-* flag
    objective = registry.resolve(args)          # or registry.get("dft-mix", alpha=0.5)
    objective.needs                             # TokenStats fields that it cannot do without
    loss, weight = objective(TokenStats(log_prob=-cross_entropy, mask=loss_mask))
    (loss.sum() / number_of_supervised_tokens).backward()

`loss` is per token, not reduced, and exactly 0 where the mask is 0. The normaliser is the number of
supervised tokens, never Σ weight. `log_prob` has to be the plain fp32 per-token −CE.

>>> import torch
>>> from megatron_dft.losses.token_stats import TokenStats
>>> log_prob = torch.tensor([-0.5, -2.0, float("nan")], requires_grad=True)
>>> loss, weight = get("dft")(TokenStats(log_prob, mask=torch.tensor([1, 1, 0])))
>>> weight
tensor([0.6065, 0.1353, 0.0000])
>>> loss.sum().backward(); log_prob.grad
tensor([-0.6065, -0.1353,  0.0000])
"""

import argparse
from typing import Any

from megatron_dft.losses import objectives, pairs
from megatron_dft.losses.weighting import WEIGHT_SOURCES, Entry, Objective, Parameter


def _row(function, source, *parameters, needs=(), **scope) -> Entry:
    return Entry(function, source, parameters, frozenset(needs), **scope)


_P = Parameter
OBJECTIVES: dict[str, Entry] = {
    "sft": _row(objectives.sft, "cross entropy"),
    "dft": _row(objectives.dft, "arXiv 2508.05629", of_prob=True),
    "dft-sequence": _row(
        objectives.dft_sequence, "2508.05629 table 5", per_conversation=True, of_prob=True
    ),
    "dft-geometric": _row(
        objectives.dft_geometric, "2508.05629 table 5", per_conversation=True, of_prob=True
    ),
    "dft-mix": _row(
        objectives.dft_mix,
        "github Lauorie/DFT",
        _P("alpha", "--dft-mix-alpha", 0.5, "α in w = α·p + 1 − α", 0.0, 1.0),
        of_prob=True,
    ),
    "dft-floor": _row(
        objectives.dft_floor,
        "github yongliang-wu/DFT, question 1",
        _P("floor", "--dft-floor", 0.1, "least weight, w = max(p, floor)", 0.0, 1.0),
        of_prob=True,
    ),
    "p-alpha": _row(
        objectives.p_alpha,
        "2510.00526",
        _P("alpha", "--dft-p-alpha", 1.0, "α in (1 − p^α)/α; 0 is cross entropy", 0.0, 100.0),
        of_prob=True,
    ),
    "nll-threshold": _row(
        objectives.nll_threshold,
        "2510.00526, 2601.09195",
        _P("threshold", "--dft-threshold", 0.1, "tokens with p below it have no weight", 0.0, 1.0),
        of_prob=True,
    ),
    "dcr": _row(
        objectives.dcr,
        "2604.14258",
        _P("tau", "--dft-dcr-tau", 0.5, "w = p below this p, 1 from it on", 0.0, 1.0),
        of_prob=True,
    ),
    "talr": _row(
        objectives.talr,
        "2509.20758",
        _P("floor", "--dft-talr-floor", 0.01, "least weight", 0.0, 1.0),
        _P(
            "tau",
            "--dft-talr-tau",
            0.0,
            "τ in p^(1/τ), nats; 0 takes the micro-batch's median cross entropy",
            0.0,
        ),
        per_batch=True,
        of_prob=True,
    ),
    "chord-phi": _row(objectives.chord_phi, "2508.11408", of_prob=True),
    "iw-sft": _row(
        objectives.iw_sft,
        "2507.12856",
        _P(
            "level",
            "--dft-iw-level",
            "token",
            "weigh each token or each conversation",
            choices=("token", "sequence"),
        ),
        _P("low", "--dft-iw-min", 0.2, "least weight (the paper's sequence level: 0)", 0.0),
        _P("high", "--dft-iw-max", 1.8, "largest weight (the paper's sequence level: 16)", 0.0),
        _P(
            "temperature",
            "--dft-iw-temperature",
            2.0,
            "factor on the conversation's mean log ratio; sequence level only",
            0.0,
        ),
        needs=("reference_log_prob",),
    ),
    "psft": _row(
        objectives.psft,
        "2508.17784",
        _P("clip", "--dft-psft-clip", 0.28, "ε: no gradient where p/p_old > 1 + ε", 0.0),
        needs=("reference_log_prob",),
    ),
    "asft": _row(
        objectives.asft,
        "2509.23753",
        _P("kl_weight", "--dft-asft-lambda", 0.05, "λ of λ·KL(base ‖ model)", 0.0),
        needs=("kl",),
        of_prob=True,
    ),
    "target-sft": _row(
        objectives.target_sft,
        "2606.11189",
        _P("eta", "--dft-target-eta", 0.5, "η: the teacher's share in π^(1−η)·π_T^η", 1e-3, 1.0),
        needs=("kl",),
        reference_share="eta",
    ),
    "idft": _row(
        objectives.idft,
        "2602.12222",
        _P("beta", "--dft-idft-beta", 1.0, "β in γ = exp(−(log p + H)/β), above 0", 1e-6),
        _P("low", "--dft-idft-min", 0.1, "least exponent γ", 0.0),
        _P("high", "--dft-idft-max", 2.0, "largest exponent γ", 0.0),
        needs=("entropy",),
    ),
    "eaft": _row(
        objectives.eaft,
        "2601.02151",
        _P("exponent", "--dft-eaft-exponent", 1.0, "exponent on H_top20 / 3", 0.0),
        needs=("entropy_top20",),
    ),
    "deft": _row(objectives.deft, "2602.11424", needs=("sum_sq_prob",)),
    "rift": _row(
        objectives.rift,
        "2601.09253",
        _P(
            "level",
            "--dft-rift-level",
            "token",
            "whose p a negative reward pushes down: each token's, or the answer's product",
            choices=("token", "sequence"),
        ),
        needs=("reward",),
    ),
    "dpo": _row(
        pairs.dpo,
        "2305.18290",
        _P("beta", "--dpo-beta", 0.1, "β, above 0: how little the model may leave the base", 1e-6),
        _P("label_smoothing", "--dpo-label-smoothing", 0.0, "ε: share of wrong pairs", 0.0, 0.5),
        _P(
            "log_probs",
            "--dpo-log-probs",
            "sum",
            "an answer's log-probability: the sum over its tokens, or length-normalised",
            choices=("sum", "mean"),
        ),
        needs=("reference_log_prob",),
        per_conversation=True,
        per_pair=True,
    ),
}
# iw-sft's paper gives each level its own clamp.
_IW_SEQUENCE_CLAMP = {"low": 0.0, "high": 16.0}


def get(name: str, *, weight_from: str = "model", **parameters: float | str) -> Objective:
    """The objective of that name; parameters by keyword, defaults for the others.

    weight_from: whose p the weight is taken from, one of weighting.WEIGHT_SOURCES.

    Raises ValueError for an unknown name, parameter or value.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"--loss: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    entry = OBJECTIVES[name]
    known = {p.name: p for p in entry.parameters}
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"--loss {name}: has the parameters {sorted(known) or 'none'}, got {unknown[0]!r}"
        )
    values = {key: p.checked(parameters.get(key, p.default)) for key, p in known.items()}
    if name == "iw-sft" and values["level"] == "sequence":
        values.update({k: v for k, v in _IW_SEQUENCE_CLAMP.items() if k not in parameters})
    elif "temperature" in parameters:
        raise ValueError(
            "--dft-iw-temperature: acts at the sequence level only; add --dft-iw-level sequence"
        )
    if "low" in values and float(values["low"]) > float(values["high"]):
        low, high = known["low"].flag, known["high"].flag
        raise ValueError(f"{low}: expected at most {high} {values['high']}, got {values['low']}")
    return Objective(name, entry, values, _source(name, weight_from))


def _source(name: str, weight_from: str) -> str:
    """The checked `weight_from`."""
    flag = f"--dft-weight-from {weight_from}"
    if weight_from not in WEIGHT_SOURCES:
        raise ValueError(f"{flag}: expected one of {', '.join(WEIGHT_SOURCES)}")
    if weight_from != "model" and not OBJECTIVES[name].of_prob:
        possible = ", ".join(n for n, entry in OBJECTIVES.items() if entry.of_prob)
        raise ValueError(
            f"{flag}: --loss {name} has no weight that follows from the target's probability "
            f"alone; drop the flag, or choose one of {possible}"
        )
    return weight_from


def named(objective: Objective | str) -> Objective:
    """The objective itself, or the one of that name with its default parameters."""
    return get(objective) if isinstance(objective, str) else objective


def add_arguments(group: Any, default: str = "dft") -> None:
    """Add --loss and a flag for every parameter to an argparse parser or argument group."""
    group.add_argument(
        "--loss",
        default=default,
        choices=list(OBJECTIVES),
        help="token objective: "
        + "; ".join(f"{name} ({entry.source})" for name, entry in OBJECTIVES.items()),
    )
    group.add_argument(
        "--dft-weight-from",
        choices=WEIGHT_SOURCES,
        default="model",
        help="whose probability of the target the weight is a function of: the model's that is "
        "trained, or the frozen reference's (PriFT-prob, 2606.09396), or in its place the mass of "
        "what the reference finds no likelier than the target (PriFT-mass: --loss nll-threshold "
        "--dft-threshold 0.5 --dft-weight-from reference-mass); for every --loss of p alone",
    )
    for name, entry in OBJECTIVES.items():
        for p in entry.parameters:
            # Default None: resolve() can tell a flag that was given from one that was not.
            group.add_argument(
                p.flag,
                default=None,
                type=str if p.choices else float,
                choices=p.choices or None,
                help=f"{p.help} (--loss {name}, {entry.source}; default {p.default})",
            )


def resolve(args: argparse.Namespace) -> Objective:
    """The objective that the parsed flags ask for.

    Raises ValueError for a value out of range and for a flag of another objective, which would
    otherwise be ignored in silence.
    """
    chosen = get(args.loss)
    given: dict[str, float | str] = {}
    for name, entry in OBJECTIVES.items():
        for p in entry.parameters:
            value = getattr(args, p.dest, None)
            if value is None:
                continue
            if name != chosen.name:
                raise ValueError(
                    f"{p.flag}: belongs to --loss {name}, got --loss {chosen.name}; "
                    f"remove it or choose --loss {name}"
                )
            given[p.name] = value
    return get(chosen.name, weight_from=getattr(args, "dft_weight_from", "model"), **given)
