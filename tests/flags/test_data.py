"""The data flags: what they parse to, and what they refuse."""

import argparse
import dataclasses

import pytest

from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.spec import RowKind
from megatron_dft.flags import data as flags


def _parse(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    flags.add_arguments(parser.add_argument_group("data"))
    return parser.parse_args(list(words))


def test_the_flags_are_options_of_a_data_set(tmp_path, monkeypatch):
    args = _parse(
        "--train-data", "0.5:a.jsonl", "2:b.parquet", "--no-packing", "--overlong", "truncate",
        "--data-errors", "skip", "--max-bad-rows", "3", "--data-cache", str(tmp_path),
        "--chat-template-args", '{"enable_thinking": false}', "--template-date", "2024-07-26",
        "--chat-rewrites", "refuse", "--data-format", "alpaca", "--data-workers", "2",
        "--chat-drops", "warn", "--columns", "output=answer", "instruction=question",
        "--mask-history", "--max-samples", "5", "--no-shuffle",
    )  # fmt: skip
    options = flags.dataset_options(args)
    assert options == dict(
        packing=False, overlong="truncate", errors="skip", max_bad_rows=3.0, cache_dir=tmp_path,
        data_format="alpaca", template_args={"enable_thinking": False},
        template_date="2024-07-26", rewrites="refuse", workers=2,
        drops="warn", valid_share=0.0, mask_history=True, max_samples=5, in_order=True,
        columns=(("instruction", "question"), ("output", "answer")), rows=RowKind(),
    )  # fmt: skip
    assert set(options) <= {field.name for field in dataclasses.fields(DatasetOptions)}
    assert args.train_data == ["0.5:a.jsonl", "2:b.parquet"]


def test_defaults_are_strict_and_pack():
    options = flags.dataset_options(_parse())
    assert options["packing"] and options["errors"] == "strict"
    assert options["overlong"] == "refuse" and options["max_bad_rows"] == 0.001


def test_the_cache_is_the_flags_the_environments_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MEGATRON_DFT_DATA_CACHE", raising=False)
    assert flags.cache_directory(_parse()) == tmp_path / ".cache/megatron_dft/data"
    monkeypatch.setenv("MEGATRON_DFT_DATA_CACHE", "/somewhere")
    assert str(flags.cache_directory(_parse())) == "/somewhere"
    assert str(flags.cache_directory(_parse("--data-cache", "/else"))) == "/else"


@pytest.mark.parametrize(
    "words, fault",
    [
        (("--chat-template-args", "{"), "not JSON"),
        (("--chat-template-args", "[1]"), "expected a JSON object"),
        (("--template-date", "26 Jul"), "expected YYYY-MM-DD"),
        (("--max-bad-rows", "1.5"), "expected a share from 0 to below 1, or a whole count"),
        (("--max-bad-rows", "-1"), "expected a share"),
        (("--data-workers", "0"), "at least 1"),
        (("--overlong", "cut"), "invalid choice"),
    ],
)
def test_values_that_mean_nothing_are_refused(words, fault):
    with pytest.raises(argparse.ArgumentError, match=fault):
        _parse(*words)


def test_a_limit_without_skip_is_refused():
    with pytest.raises(ValueError, match="--max-bad-rows 3 has no meaning with --data-errors str"):
        flags.dataset_options(_parse("--max-bad-rows", "3"))


def _of_loss(loss, *words):
    args = _parse(*words)
    args.loss = loss
    return flags.dataset_options(args)["rows"]


def test_the_loss_says_what_rows_are():
    assert _of_loss("dft") == RowKind() and _of_loss("dpo") == RowKind("pairs")
    assert _of_loss("dft", "--reward-weights") == RowKind("weighted")
    assert _of_loss("rift") == RowKind("rewarded", -0.2)
    assert _of_loss("rift", "--wrong-reward", "0") == RowKind("rewarded", 0.0)


@pytest.mark.parametrize(
    "loss, words, fault",
    [
        ("dpo", ("--reward-weights",), "--reward-weights: has no meaning under --loss dpo"),
        ("rift", ("--reward-weights",), "--reward-weights: has no meaning under --loss rift"),
        ("dft", ("--wrong-reward", "-1"), "--wrong-reward: belongs to --loss rift, got --loss dft"),
        ("rift", ("--wrong-reward", "0.5"), "--wrong-reward: expected at most 0, got 0.5"),
        ("rift", ("--wrong-reward", "nan"), "--wrong-reward: expected at most 0, got nan"),
    ],
)
def test_rewards_that_mean_nothing_are_refused(loss, words, fault):
    with pytest.raises(ValueError, match=fault):
        _of_loss(loss, *words)


def test_a_parser_that_knows_chat_template_keeps_its_own():
    parser = argparse.ArgumentParser()
    parser.add_argument("--chat-template", default="mine")
    flags.add_arguments(parser.add_argument_group("data"))
    assert parser.parse_args([]).chat_template == "mine"
