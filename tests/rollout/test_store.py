"""What a sample directory holds after a kill at any byte, and what it refuses."""

import json

import pytest

from megatron_dft.rollout.prompts import Prompt
from megatron_dft.rollout.store import SampleStore, read_samples, read_stored_prompts

PROMPTS = [Prompt(n, [{"role": "user", "content": f"q{n}"}], n, f"f:{n}") for n in range(3)]
SETTINGS = {"temperature": 1.0}


def record(prompt, sample, text="é\n"):
    return {"prompt": prompt, "sample": sample, "text": text, "finish": "stop"}


def opened(directory, part=0, parts=1, settings=SETTINGS):
    store = SampleStore(directory, part, parts)
    store.open(settings, PROMPTS)
    return store


def test_a_file_cut_at_any_byte_is_healed(tmp_path):
    store = opened(tmp_path)
    store.append([record(0, 0), record(0, 1), record(1, 0)])
    store.close()
    file = tmp_path / "samples.0-of-1.jsonl"
    whole = file.read_bytes()
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        store = opened(tmp_path)
        lines = whole[:size].count(b"\n")
        assert len(store.done()) == lines
        store.append([record(2, 2)])
        store.close()
        assert len(read_samples(tmp_path)) == lines + 1
        assert file.read_bytes() == whole[: _after_newline(whole, lines)] + _line(record(2, 2))


def _after_newline(data, lines):
    at = 0
    for _ in range(lines):
        at = data.index(b"\n", at) + 1
    return at


def _line(one):
    return (json.dumps(one, ensure_ascii=False) + "\n").encode()


def test_a_torn_line_longer_than_a_read_is_cut_off(tmp_path):
    opened(tmp_path).close()
    file = tmp_path / "samples.0-of-1.jsonl"
    file.write_bytes(_line(record(0, 0)) + b"x" * 200_000)
    opened(tmp_path).close()
    assert file.read_bytes() == _line(record(0, 0))


def test_damage_before_the_end_names_file_and_line(tmp_path):
    opened(tmp_path).close()
    file = tmp_path / "samples.0-of-1.jsonl"
    file.write_bytes(_line(record(0, 0)) + b'{"prompt": 1, \n' + _line(record(1, 0)))
    with pytest.raises(ValueError, match=r"samples\.0-of-1\.jsonl:2: damaged"):
        read_samples(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(ValueError, match="temperature 1.0, but now it is 0.5"):
        opened(tmp_path, settings={"temperature": 0.5})
    with pytest.raises(ValueError, match="top_p None, but now it is 0.9"):
        opened(tmp_path, settings=SETTINGS | {"top_p": 0.9})


def test_two_writers_of_one_part_are_refused_and_two_parts_are_not(tmp_path):
    first = opened(tmp_path, 0, 2)
    with pytest.raises(ValueError, match="another process writes samples.0-of-2.jsonl"):
        opened(tmp_path, 0, 2)
    second = opened(tmp_path, 1, 2)
    first.append([record(0, 0)])
    second.append([record(1, 0), record(0, 0, "drawn twice")])
    assert first.done() == second.done() == {(0, 0), (1, 0)}
    found = read_samples(tmp_path)
    assert [(r["prompt"], r["text"]) for r in found] == [(0, "é\n"), (1, "é\n")]
    first.close()
    second.close()


def test_prompts_come_back(tmp_path):
    opened(tmp_path).close()
    assert read_stored_prompts(tmp_path) == PROMPTS
