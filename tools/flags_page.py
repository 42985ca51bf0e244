"""Write docs/flags.md and what --help prints (megatron_dft/flags/help.json) from the flags
themselves: `python tools/flags_page.py`."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_dft.flags.definitions import define
from megatron_dft.flags.help_page import TABLE, Defaults

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
_HEAD = """# Every flag

Every Megatron flag works beside these, but those that a run refuses by name: `megatron-dft train
--help` prints these and those of Megatron's that most runs set, `--help-megatron` all the others.
This page is made by `python tools/flags_page.py`.
"""


def page() -> str:
    """The page's text: a table a subject."""
    formatter = argparse.HelpFormatter("megatron_dft")
    parts = [_HEAD]
    for group in _groups(scoring=True):
        parts.append(f"\n## {(group.title or '').capitalize()}\n")
        parts.append("| flag | value | default | what it does |\n|---|---|---|---|")
        for action in group._group_actions:
            cells = (
                f"`{action.option_strings[-1]}`",
                _value(action),
                "" if action.default in (None, False, [], 0.0) else f"`{action.default}`",
                formatter._expand_help(action) if action.help else "",
            )
            parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(parts) + "\n"


def table() -> str:
    """The text of help.json, as flags/help_page.py reads it."""
    of_training = {group.title for group in _groups(scoring=False)}
    groups = [
        {
            "title": group.title,
            "description": group.description,
            "scoring": group.title not in of_training,
            "rows": [_row(action) for action in group._group_actions],
        }
        for group in _groups(scoring=True)
    ]
    return json.dumps(groups, indent=1, ensure_ascii=False) + "\n"


def _groups(scoring: bool) -> list[argparse._ArgumentGroup]:
    parser = argparse.ArgumentParser(add_help=False, prog="megatron_dft")
    define(parser, scoring)
    return [group for group in parser._action_groups if group._group_actions]


def _row(action: argparse.Action) -> dict[str, Any]:
    formatter = Defaults("megatron_dft")
    metavar = action.metavar or action.dest.upper()
    if action.choices and not action.metavar:
        metavar = "{" + ",".join(map(str, action.choices)) + "}"
    return {
        "flags": list(action.option_strings),
        "metavar": metavar,
        "nargs": action.nargs,
        "help": formatter._expand_help(action) if action.help else "",
    }


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return " ".join(f"`{choice}`" for choice in action.choices)
    name = action.metavar or action.dest.upper()
    return f"{name}{' …' if action.nargs == '+' else ''}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    TABLE.write_text(table(), encoding="utf-8")
