"""Write docs/flags.md from the flags themselves: `python tools/flags_page.py`."""

import argparse
from pathlib import Path

from megatron_dft.flags.resolve import define

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
_HEAD = """# Every flag

Every Megatron flag works beside these, but those that a run refuses by name: `megatron-dft train
--help` prints these and those of Megatron's that most runs set, `--help-megatron` all the others.
This page is made by `python tools/flags_page.py`.
"""


def page() -> str:
    """The page's text: a table a subject."""
    parser = argparse.ArgumentParser(add_help=False, prog="megatron_dft")
    define(parser, scoring=True)
    formatter = argparse.HelpFormatter(parser.prog)
    parts = [_HEAD]
    for group in parser._action_groups:
        if not group._group_actions:
            continue
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


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return " ".join(f"`{choice}`" for choice in action.choices)
    name = action.metavar or action.dest.upper()
    return f"{name}{' …' if action.nargs == '+' else ''}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
