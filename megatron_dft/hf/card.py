"""The README.md of an exported model: what it was trained from, how, on what, with which result."""

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from megatron_dft.hf.source import HFCheckpoint

_PACKAGES = ("megatron-dft", "megatron-core", "torch", "transformers")


def model_card(
    checkpoint: HFCheckpoint,
    *,
    objective: str,
    parameters: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    command: str | None = None,
) -> str:
    """Text of the model card.

    objective   name of the loss, e.g. "dft" or "sft"
    parameters  training settings worth repeating (learning rate, batch, steps, layout)
    data        file or data-set name -> SHA-256 of its bytes
    metrics     final figures by the name they have in the log
    command     the command line that trained it
    """
    base = checkpoint.name
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and checkpoint.revision
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_name:
        front.append(f"base_model: {base}")
    license_line = _license(checkpoint)
    if license_line:
        front.append(license_line)
    front.append(f"tags:\n- megatron-dft\n- {objective}")
    origin = f"`{base}`" + (f" at commit `{checkpoint.revision}`" if checkpoint.revision else "")
    lines = ["---", *front, "---", "", "# Fine-tuned model", ""]
    lines.append(f"Fine-tuned from {origin} with the objective `{objective}` by megatron-dft.")
    if objective == "dft":
        lines.append(
            "Dynamic Fine-Tuning weighs each token's negative log-likelihood with the token's own "
            "detached probability ([arXiv 2508.05629](https://arxiv.org/abs/2508.05629))."
        )
    versions = {p: v for p in _PACKAGES if (v := _version(p))}
    for title, rows in (
        ("Settings", parameters),
        ("Data (SHA-256)", data),
        ("Final metrics", metrics),
        ("Versions", versions),
    ):
        if rows:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()]
    if command:
        lines += ["", "## Command", "", "```", command, "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _license(checkpoint: HFCheckpoint) -> str | None:
    """The base model's licence as its own card states it; a derivative is bound by it."""
    readme = checkpoint.path / "README.md"
    if not readme.is_file():
        return None
    match = re.search(r"^license: *(\S+)$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return f"license: {match[1]}" if match else None
