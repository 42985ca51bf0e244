"""The diagnosis as a page: verdict, histograms, entropy map, token lists."""

import json
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm

from megatron_dft.drift import style
from megatron_dft.drift.diagnosis import BINS, LOW, SURE_NATS
from megatron_dft.drift.labels import model_name
from megatron_dft.drift.page import Picture, Section, Table, render
from megatron_dft.storage.files import write_whole

_FIELDS = (
    "tokens",
    "mean_prob",
    "cross_entropy",
    "mean_entropy",
    "low",
    "low_sure",
    "low_unsure",
    "low_sft_gradient",
    "low_dft_gradient",
)
_EDGES = [i / BINS for i in range(BINS)]


def _overall(result: dict[str, Any]) -> bytes:
    picture, (left, right) = style.figure(2)
    overall = result["overall"]
    shares = [c / overall["tokens"] for c in overall["histogram"]]
    left.bar(_EDGES, shares, 1 / BINS, align="edge", color=style.colour(0), edgecolor="white")
    left.axvline(overall["mean_prob"], color=style.colour(1), ls="--", label="mean")
    name = style.plain(model_name(result.get("model", "the base")))
    left.set(title=f"{name}: probability of each target", xlabel="p", ylabel="share of tokens")
    left.legend(frameon=False)
    values = [overall["low"], overall["low_sft_gradient"] or 0, overall["low_dft_gradient"] or 0]
    names = ("of the tokens", "of SFT's gradient", "of DFT's gradient")
    for name, value, i in zip(names, values, (5, 0, 1), strict=True):
        right.bar([name], [value], 0.6, **style.bar(i))
    for i, value in enumerate(values):
        right.text(i, value, f"{value:.1%}", ha="center", va="bottom")
    right.set(title=f"Share that tokens with p < {LOW} have", ylim=(0, 1.08))
    return style.png(picture)


def _groups(result: dict[str, Any]) -> bytes:
    picture, axes = style.figure(2, 3.8)
    panels = (("places", "token's place in the answer"), ("classes", "token class"))
    for ax, (key, name) in zip(axes, panels, strict=True):
        rows = list(result[key].values())
        data = [[c / r["tokens"] for c in r["histogram"]] for r in rows]
        image = ax.imshow(
            list(zip(*data, strict=True)),
            origin="lower",
            aspect="auto",
            extent=(-0.5, len(rows) - 0.5, 0, 1),
            cmap="Blues",
        )
        means = [r["mean_prob"] for r in rows]
        ax.plot(range(len(rows)), means, "o", color=style.colour(1), label="mean", clip_on=False)
        ax.set_xticks(range(len(rows)), [style.plain(str(k)) for k in result[key]])
        ax.grid(False)
        ax.set(title=f"Probability by {name}", ylabel="p")
        picture.colorbar(image, ax=ax, label="share of the group")
    axes[1].legend(loc="upper right", fontsize=8)
    return style.png(picture)


def _map(result: dict[str, Any]) -> bytes:
    picture, (ax,) = style.figure(1, 4.0)
    edges, counts = result["map"]["entropy_edges"], result["map"]["counts"]
    # Empty cells stay white: a zero has no logarithm.
    data = [[c or float("nan") for c in row] for row in counts]
    image = ax.imshow(
        data,
        origin="lower",
        aspect="auto",
        extent=(edges[0], edges[-1], 0, 1),
        cmap="viridis",
        norm=LogNorm(1, max(max(max(r) for r in counts), 2)),
    )
    ax.plot([0, edges[-1]], [LOW, LOW], "--", color="#1c2430", lw=1)
    ax.plot([SURE_NATS, SURE_NATS], [0, LOW], "--", color="#1c2430", lw=1)
    # The upper right is empty in every such plot: a high p rules a high entropy out.
    text = (
        "below the line, left of the mark: sure of something else\nright of it: missing knowledge"
    )
    ax.text(0.98, 0.95, text, transform=ax.transAxes, ha="right", va="top", fontsize=9)
    ax.set(xlabel="entropy of the base's prediction (nats)", ylabel="p of the target")
    ax.grid(False)
    picture.colorbar(image, ax=ax, label="tokens")
    return style.png(picture)


def _list(rows: list[dict[str, Any]], caption: str) -> Table:
    columns = ("token", "count", "mean p", "entropy", "the base would say", "its p")
    keys = ("count", "mean_prob", "mean_entropy")
    body = [
        [repr(r["text"]), *(r[k] for k in keys), repr(r["instead"]), r["instead_prob"]]
        for r in rows
    ]
    return Table(columns, body, caption if rows else f"{caption} None.")


def _expectation(result: dict[str, Any]) -> str:
    found, places = result["without_special"], result["places"]
    first, last = next(iter(places)), list(places)[-1]
    text = (
        f"The model gives what it is to learn a mean probability of {found['mean_prob']:.2f}; "
        f"{found['low']:.1%} of the tokens are below {LOW}, take "
        f"{found['low_sft_gradient'] or 0:.0%} of SFT's gradient and "
        f"{found['low_dft_gradient'] or 0:.0%} of DFT's"
    )
    if first != last:
        rise = places[last]["mean_prob"] - places[first]["mean_prob"]
        where = "an answer's beginning" if rise > 0.05 else "its end" if rise < -0.05 else None
        text += f"; {where} surprises it most" if where else "; all places surprise it alike"
    return text + "."


def _unlikely(result: dict[str, Any]) -> str:
    found = result["without_special"]
    if not found["low"]:
        return f"No token is below {LOW}: neither outliers nor missing knowledge."
    sure = found["low_sure"] / found["low"]
    kind = "contradict what it is sure of" if sure > 0.5 else "are things it does not know"
    text = f"Of the unlikely tokens {sure:.0%} meet a model that is sure of something else: "
    return f"{text}most {kind}."


def sections(result: dict[str, Any]) -> list[Section]:
    advice = result["recommendation"]
    name = model_name(result.get("model", "the base"))
    tables = [
        Table((name, *_FIELDS), [[k, *(row[f] for f in _FIELDS)] for k, row in rows.items()])
        for name, rows in (
            (
                "all",
                {"all": result["overall"], "without special tokens": result["without_special"]}
                | ({"ends of answers": result["ends"]} if result["ends"] else {}),
            ),
            ("place in the answer", result["places"]),
            ("token class", result["classes"]),
        )
    ]
    return [
        Section(
            "Recommendation",
            result.get("notes", ()),
            verdict=(
                f"--loss {advice['loss']}",
                " ".join(advice[key] for key in ("reason", "ends") if key in advice),
            ),
        ),
        Section(
            f"What {name} expects",
            [
                f"low: share of tokens with p < {LOW}; low_sure those of them where the base's "
                f"entropy is below {SURE_NATS} nat, low_unsure the others; low_sft_gradient and "
                "low_dft_gradient: what the low ones hold of the sum of ‖∂loss/∂logits‖."
            ],
            [
                Picture("probability.png", _overall(result)),
                Picture("groups.png", _groups(result), "Columns add up to 1; dots are means."),
            ],
            tables,
            meaning=_expectation(result),
        ),
        Section(
            "Outliers or missing knowledge",
            [
                "A low probability with low entropy: the base is sure of something else (a wrong "
                "label, a style it contradicts). With high entropy: it does not know. DFT mutes "
                "both, which helps for the first and hurts for the second."
            ],
            [Picture("entropy.png", _map(result))],
            [
                _list(result["confidently_wrong"], "Confidently wrong: low p, low entropy."),
                _list(result["missing_knowledge"], "Missing knowledge: low p, high entropy."),
                _list(result["rare_but_right"], "Rare but right: rare here, p above 0.5."),
            ],
            meaning=_unlikely(result),
        ),
    ]


def write(directory: Path, result: dict[str, Any]) -> None:
    """diagnosis.json, diagnosis.html and its pictures."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "diagnosis.json", json.dumps(result, indent=1, allow_nan=False))
    parts = sections(result)
    for part in parts:
        for picture in part.pictures:
            write_whole(directory / picture.name, picture.png)
    subtitle = f"model {result.get('model', '')} · data {result.get('data', '')}"
    name, data = (model_name(result.get(k, "")) for k in ("model", "data"))
    page = render(f"Is DFT the right loss to teach {name} {data}?", subtitle, parts)
    write_whole(directory / "diagnosis.html", page)
