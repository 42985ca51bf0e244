"""The README.md of an exported model: what it was trained from, how, on what, with which result."""

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from megatron_dft.hf import links
from megatron_dft.hf.markdown import block, code, plain, yaml
from megatron_dft.hf.portable import hub_name, portable
from megatron_dft.hf.secrets import masked_text
from megatron_dft.hf.source import HFCheckpoint

_README_BYTES = 1 << 20  # a model's card has some kilobytes
_PACKAGES = ("megatron-dft", "megatron-core", "torch", "transformers")


def model_card(
    checkpoint: HFCheckpoint,
    *,
    objective: str,
    parameters: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    command: str | None = None,
    base_model: str | None = None,
) -> str:
    """Text of the model card.

    objective   name of the loss, e.g. "dft" or "sft"
    parameters  training settings worth repeating (learning rate, batch, steps, layout)
    data        file or data-set name -> SHA-256 of its bytes; of a path its end is shown
    metrics     final figures by the name they have in the log
    command     the command line that trained it, its secrets masked (secrets.masked_line) and
                without paths of this machine (portable.portable)
    base_model  hub name of the base where the checkpoint does not tell it: a directory
    """
    known, commit = hub_name(checkpoint)
    known = base_model or known
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if known:
        front.append(f"base_model: {yaml(known)}")
    license_name = _license(checkpoint)
    if license_name:
        front.append(f"license: {yaml(license_name)}")
    front.append(f"tags:\n- megatron-dft\n- {yaml(objective)}")
    origin = code(known or checkpoint.path.absolute().name)
    origin += f" at commit {code(commit)}" if commit else ""
    lines = ["---", *front, "---", "", "# Fine-tuned model", ""]
    lines.append(f"Fine-tuned from {origin} with the objective {code(objective)} by megatron-dft.")
    if objective == "dft":
        lines.append(
            "Dynamic Fine-Tuning weighs each token's negative log-likelihood with the token's own "
            "detached probability ([arXiv 2508.05629](https://arxiv.org/abs/2508.05629))."
        )
    if data:
        data = dict(zip(portable(data), data.values(), strict=True))
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
        lines += ["", "## Command", "", block(command)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return plain(masked_text(text))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _license(checkpoint: HFCheckpoint) -> str | None:
    """The base model's licence as its own card states it; a derivative is bound by it."""
    readme = checkpoint.path / "README.md"
    try:
        # A link out of the model is not followed; an unreadable card costs no export.
        links.check(checkpoint.path, readme)
        text = readme.read_bytes()[:_README_BYTES].decode("utf-8-sig", "replace")
    except (OSError, ValueError):
        return None
    head = re.match(r"---[ \t]*\r?\n(.*?\n)---", text, re.DOTALL)
    found = head and re.search(r"^license:[ \t]*([^\r\n]+)", head[1], re.MULTILINE)
    return _unquoted(found[1]) if found else None


def _unquoted(text: str) -> str:
    """A YAML scalar of one line; no part of YAML that could name objects is read."""
    text = re.sub(r"\s+#.*$", "", text.strip())
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
