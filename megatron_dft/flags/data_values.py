"""What the values of the data flags must be; argparse names the flag.

Each raises argparse.ArgumentTypeError.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from typing import Any


def template_args(text: str) -> Mapping[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def template_date(text: str) -> str:
    """An ISO date."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected YYYY-MM-DD, got {text!r}") from None


def valid_share(text: str) -> float:
    """A share from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to below 1, got {text!r}")
    return value


def max_bad_rows(text: str) -> float:
    """A share below 1, or a whole count."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(
            f"expected a share from 0 to below 1, or a whole count, got {text!r}"
        )
    return value


def whole_number(text: str) -> int:
    """At least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
