"""Conversations with the trained tokens marked, for a terminal or a browser."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.storage.terminal import visible

# A shown conversation: its file:line and its runs of text, each with whether it trains.
Shown = tuple[str, list[tuple[str, bool]]]

_STYLE = """\
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #999; padding: .8rem;
  background: #fff; color: #555; }
mark { background: #c7f0cd; color: #063; font-weight: bold; }
"""


def runs(flagged: np.ndarray, tokenizer: Any) -> list[tuple[str, bool]]:
    """uint32 [n] flagged tokens to maximal runs of decoded text that train or do not."""
    trains = (flagged & SUPERVISED) != 0
    borders = [0, *(np.flatnonzero(np.diff(trains)) + 1).tolist(), len(flagged)]
    return [
        (
            tokenizer.decode((flagged[a:b] & ID_MASK).tolist(), clean_up_tokenization_spaces=False),
            bool(trains[a]),
        )
        for a, b in zip(borders, borders[1:], strict=False)
    ]


def print_shown(shown: Sequence[Shown], console: Console) -> None:
    """Trained text green where there is colour, between ⟦ ⟧ where there is none."""
    coloured = console.color_system is not None
    for where, pieces in shown:
        console.print(Text(f"── {where}", style="bold"), soft_wrap=True)
        text = Text()
        for piece, trains in pieces:
            safe = visible(piece)
            if trains and not coloured:
                safe = f"⟦{safe}⟧"
            text.append(safe, style="bold green" if trains else "dim")
        console.print(text, soft_wrap=True)


def as_html(shown: Sequence[Shown], title: str) -> str:
    """A page without scripts; every character of the data is escaped."""
    body = []
    for where, pieces in shown:
        marked = "".join(
            f"<mark>{html.escape(visible(t))}</mark>" if trains else html.escape(visible(t))
            for t, trains in pieces
        )
        body.append(f"<h2>{html.escape(where)}</h2>\n<pre>{marked}</pre>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p><mark>Marked</mark> text trains.</p>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
