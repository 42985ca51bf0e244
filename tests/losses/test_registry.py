"""Flags reach the objective that they belong to, and a wrong one is named in a line."""

import argparse

import pytest

from megatron_dft.losses import registry


def _parse(*argv: str) -> registry.Objective:
    parser = argparse.ArgumentParser()
    registry.add_arguments(parser.add_argument_group("objective"))
    return registry.resolve(parser.parse_args(argv))


def test_flags_reach_the_objective():
    assert _parse().name == "dft"
    assert _parse("--loss", "dft-mix", "--dft-mix-alpha", "0.25").values == {"alpha": 0.25}
    assert _parse("--loss", "iw-sft").values["high"] == 1.8
    sequence = _parse("--loss", "iw-sft", "--dft-iw-level", "sequence")
    assert sequence.values == {"level": "sequence", "low": 0.0, "high": 16.0, "temperature": 2.0}
    assert sequence.per_conversation and not sequence.per_token
    assert not _parse("--loss", "talr").per_token and _parse("--loss", "psft").per_token


@pytest.mark.parametrize("name", registry.OBJECTIVES)
def test_help_names_every_flag_with_its_source(name):
    parser = argparse.ArgumentParser()
    registry.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for parameter in registry.OBJECTIVES[name].parameters:
        assert parameter.flag in text and registry.OBJECTIVES[name].source in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "dft", "--dft-floor", "0.2"], "--dft-floor: belongs to --loss dft-floor"),
        (["--loss", "dft-mix", "--dft-mix-alpha", "2"], "--dft-mix-alpha: expected .* got 2"),
        (["--loss", "talr", "--dft-talr-tau", "nan"], "--dft-talr-tau: expected"),
        (["--loss", "iw-sft", "--dft-iw-temperature", "1"], "--dft-iw-temperature: acts at"),
        (["--loss", "iw-sft", "--dft-iw-min", "3"], "--dft-iw-min: expected at most"),
        (["--loss", "idft", "--dft-idft-min", "3"], "--dft-idft-min: expected at most"),
        (["--loss", "idft", "--dft-idft-beta", "0"], "--dft-idft-beta: expected"),
        (
            ["--loss", "psft", "--dft-weight-from", "reference"],
            "--dft-weight-from reference: --loss psft has no weight .* one of dft, dft-sequence",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        _parse(*argv)
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--loss: expected one of sft, dft"):
        registry.get("grpo")
    with pytest.raises(ValueError, match="--loss dft: has the parameters none, got 'alpha'"):
        registry.get("dft", alpha=1.0)
