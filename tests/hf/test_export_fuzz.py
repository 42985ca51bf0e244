"""Malformed model, generation and tokenizer settings: one line, or an export that is whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dft.hf import companions
from megatron_dft.hf.companions import TrainedChat
from megatron_dft.hf.config import megatron_args, own_layers
from megatron_dft.hf.layout import check_layout
from megatron_dft.hf.source import open_checkpoint
from tests.hf.tiny import make_tiny

END = 257
CHAT = TrainedChat({"default": "{{ messages }}", "tool_use": "x"}, (END,))
FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
NAMES = (
    "eos_token_id", "chat_template", "auto_map", "architectures", "rope_parameters", "model_type",
)  # fmt: skip
KINDS = ("llama", "qwen2", "deepseek-v3", "gemma3")

_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(),
    st.text(max_size=12), st.sampled_from(["", "llama", "yarn", "silu", "float8_e4m3fn"]),
)  # fmt: skip
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
_missing = object()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """kind → a tiny model's directory, with a generation_config.json."""
    made = {}
    for kind in KINDS:
        layers = 4 if kind == "gemma3" else 2
        directory = tmp_path_factory.mktemp(kind) / "base"
        made[kind] = make_tiny(kind, directory, num_hidden_layers=layers)
        (made[kind] / "generation_config.json").write_text('{"eos_token_id": 258, "top_p": 0.9}')
    return made


@st.composite
def damages(draw: Any) -> tuple[str, str, Any]:
    """(kind, file, what to do to it): other bytes, another value, or a key changed or removed."""
    kind, file = draw(st.sampled_from(KINDS)), draw(st.sampled_from(FILES))
    how = draw(st.sampled_from(("bytes", "whole", "key", "key", "key", "nested")))
    if how == "bytes":
        return kind, file, draw(st.binary(max_size=40))
    if how == "whole":
        return kind, file, json.dumps(draw(_values)).encode()
    name = draw(st.one_of(st.integers(0, 60), st.sampled_from(NAMES)))
    return kind, file, (how, name, draw(st.one_of(_values, st.just(_missing))))


def damaged(content: dict[str, Any], change: tuple[str, Any, Any]) -> dict[str, Any]:
    how, name, value = change
    content = json.loads(json.dumps(content))
    if isinstance(name, int):
        name = sorted(content)[name % len(content)]
    place = content
    if how == "nested" and isinstance(content.get(name), dict) and content[name]:
        place = content[name]
        name = sorted(place)[0]
    if value is _missing:
        place.pop(name, None)
    else:
        place[name] = value
    return content


def survives(directory: Path, out: Path) -> str:
    """Opened, turned into Megatron's flags and exported as a run would: "whole", or the refusal."""
    try:
        checkpoint = open_checkpoint(directory, trust_remote_code=True)
        companions.check(checkpoint)
        megatron_args(checkpoint)
        own_layers(checkpoint)
        check_layout(checkpoint, tensor_parallel=2, pipeline_parallel=1, expert_parallel=1)
    except ValueError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) < 1000
        return str(refusal)
    companions.write(checkpoint, out, CHAT)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert END in (ends if isinstance(ends, list) else [ends])
    assert (out / "chat_template.jinja").read_text() == CHAT.templates["default"]
    json.loads((out / "tokenizer_config.json").read_text())
    return "whole"


def fuzz(bases: dict[str, Path], tmp_path: Path, examples: int) -> dict[str, int]:
    """How many inputs of each file were refused, and how many gave a whole export."""
    seen: dict[str, int] = {}
    number = 0

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damages())
    def one(damage):
        nonlocal number
        number += 1
        kind, file, change = damage
        directory, out = tmp_path / f"{number}", tmp_path / f"{number}-out"
        shutil.copytree(bases[kind], directory, copy_function=_linked)
        out.mkdir()
        path = directory / file
        before = json.loads(path.read_text())
        path.unlink()
        path.write_bytes(
            change if isinstance(change, bytes) else json.dumps(damaged(before, change)).encode()
        )
        names = sorted(p.name for p in directory.iterdir())
        outcome = survives(directory, out)
        if outcome != "whole":
            assert not list(out.iterdir()), "something was written"
        assert sorted(p.name for p in directory.iterdir()) == names
        key = f"{file}: {'whole' if outcome == 'whole' else 'refused'}"
        seen[key] = seen.get(key, 0) + 1
        shutil.rmtree(directory)
        shutil.rmtree(out)

    one()
    return seen


def _linked(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_model_is_exported_whole(kind, bases, tmp_path):
    """Else the fuzz would only ever see one and the same refusal."""
    assert survives(bases[kind], tmp_path) == "whole"


def test_a_slice(bases, tmp_path):
    assert len(fuzz(bases, tmp_path, 150)) >= 5


@pytest.mark.slow
def test_many(bases, tmp_path):
    seen = fuzz(bases, tmp_path, 4000)
    print(sum(seen.values()), seen)
    assert sum(seen.values()) >= 2000
