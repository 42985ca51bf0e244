"""A chat template that knows by itself the variables it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def with_defaults(template: str, variables: Mapping[str, Any]) -> str:
    """Jinja text that renders without `variables` as `template` does with them.

    Whoever gives one of them at inference still has the last word. Names that no template can read
    are left out.
    """
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in variables.items()
        if name.isidentifier()
    ]
    # Templates are rendered with trim_blocks: the line breaks behind these lines vanish.
    return "".join(lines) + template


def _literal(value: Any) -> str:
    """A JSON value in Jinja's spelling."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
