"""The wrapped loss function against the formulas in float64, and what it refuses."""

import argparse
import sys
from argparse import Namespace

import pytest
import torch

from megatron_dft import stock
from tests.patches.stock_args import (
    ACCEPTED,
    CROSS_ENTROPY,
    FORMULAS,
    MASK,
    REFUSED,
    flags,
    plain_loss,
    with_setting,
)


@pytest.fixture
def train_on(monkeypatch):
    """Call the wrapped function on the batch above, in training unless told otherwise."""

    def call(*words, evaluation=False, cross_entropy=None, mask=None, given=None):
        args = flags(*words) if given is None else given
        monkeypatch.setattr(stock, "get_args", lambda: args)
        model = torch.nn.Module().train(not evaluation)
        ce = torch.tensor(CROSS_ENTROPY) if cross_entropy is None else cross_entropy
        ce = ce.clone().requires_grad_()
        chosen = torch.tensor(MASK) if mask is None else mask
        loss, count, report = stock.weighted_loss(plain_loss)(chosen, ce, model=model)
        (3.0 * loss).backward()
        return loss.detach(), count, report, ce.grad / 3.0

    return call


@pytest.mark.parametrize("name", FORMULAS)
def test_value_gradient_and_report_against_the_formula(train_on, name):
    words, formula = FORMULAS[name]
    ce, mask = torch.tensor(CROSS_ENTROPY).double(), torch.tensor(MASK).double()
    p = (-ce).exp()
    weight, value = formula(p, ce)
    loss, count, report, gradient = train_on("--loss", name, *words)
    assert count == 5 and count.dtype == torch.int
    torch.testing.assert_close(loss.double(), (value * mask).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), weight * mask, rtol=1e-6, atol=0)
    for key, each in (
        ("lm loss", ce),
        (f"{name} loss", value),
        ("dft/mean-prob", p),
        ("dft/mean-weight", weight),
    ):
        expected = torch.stack([(each * mask).sum(), mask.sum()])
        torch.testing.assert_close(report[key].double(), expected, rtol=1e-6, atol=0)
    histogram = [float(report[f"dft/p-histogram/{bin}"][0]) for bin in range(10)]
    # p = 0.95, 0.41, 0.0009; 0.33, 0.55
    assert histogram == [1, 0, 0, 1, 1, 1, 0, 0, 0, 1]


def test_ignored_positions_may_hold_anything(train_on):
    ce, mask = torch.tensor(CROSS_ENTROPY), torch.tensor(MASK)
    clean = train_on("--loss", "dft")
    garbage = torch.tensor([float("nan"), float("inf"), -7.0])
    dirty = train_on("--loss", "dft", cross_entropy=ce.masked_scatter(mask == 0, garbage))
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[3], dirty[3])
    assert all(torch.equal(clean[2][key], dirty[2][key]) for key in clean[2])


def test_no_supervised_token_is_a_zero_that_is_part_of_the_graph(train_on):
    loss, count, report, gradient = train_on("--loss", "dft", mask=torch.zeros(2, 4))
    assert loss == 0 and count == 0
    assert torch.equal(gradient, torch.zeros(2, 4))
    assert torch.equal(report["lm loss"], torch.zeros(2))


def test_the_report_does_not_follow_the_loss(monkeypatch):
    args = flags("--loss", "dft")
    monkeypatch.setattr(stock, "get_args", lambda: args)
    ce = torch.tensor(CROSS_ENTROPY, requires_grad=True)
    loss, _, report = stock.weighted_loss(plain_loss)(torch.tensor(MASK), ce)
    before = {key: entry.clone() for key, entry in report.items()}
    with torch.no_grad():
        loss.mul_(0.25)  # Megatron's schedules do this
    assert all(torch.equal(before[key], entry) for key, entry in report.items())


@pytest.mark.parametrize("words", [["--loss", "sft"], [], ["--loss", "dft"]])
def test_evaluation_and_sft_are_the_scripts_own(train_on, words):
    evaluation = words == ["--loss", "dft"]
    loss, count, report, gradient = train_on(*words, evaluation=evaluation)
    expected = plain_loss(torch.tensor(MASK), torch.tensor(CROSS_ENTROPY))
    assert torch.equal(loss, expected[0]) and torch.equal(count, expected[1])
    assert report.keys() == {"lm loss"} and torch.equal(report["lm loss"], expected[2]["lm loss"])
    assert torch.equal(gradient, torch.tensor(MASK))


def test_without_a_model_autograd_tells_training_from_evaluation(monkeypatch):
    args = flags("--loss", "dft")
    monkeypatch.setattr(stock, "get_args", lambda: args)
    wrapped = stock.weighted_loss(plain_loss)
    batch = torch.tensor(MASK), torch.tensor(CROSS_ENTROPY)
    with torch.no_grad():
        assert torch.equal(wrapped(*batch)[0], plain_loss(*batch)[0])
    assert "dft loss" in wrapped(*batch)[2]


def test_a_script_without_our_flags_is_left_alone(train_on):
    assert train_on(given=Namespace())[2].keys() == {"lm loss"}


@pytest.mark.parametrize(("dest", "value"), REFUSED)
def test_what_is_refused_under_dft_and_not_under_sft(dest, value):
    with pytest.raises(ValueError) as caught:
        stock.check(with_setting(dest, value, "--loss", "dft"))
    message = str(caught.value)
    assert message.startswith("--" + dest.replace("_", "-") + ": ") and "\n" not in message
    assert "--loss dft" in message and str(value) in message and "drop it" in message
    assert stock.check(with_setting(dest, value, "--loss", "sft")).name == "sft"


@pytest.mark.parametrize(("dest", "value"), ACCEPTED)
def test_what_is_not_refused(dest, value):
    assert stock.check(with_setting(dest, value, "--loss", "dft")).name == "dft"


def test_every_refusal_is_tested():
    assert {dest for dest, _ in REFUSED} == set(stock._REFUSED)


@pytest.mark.parametrize(
    ("words", "settings", "expected"),
    [
        (
            ["--loss", "dft"],
            {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
            "--cross-entropy-fusion-impl: expected native",
        ),
        (["--loss", "eaft"], {}, "--loss eaft: needs entropy_top20"),
        (["--loss", "deft"], {}, "--loss deft: needs sum_sq_prob"),
        (["--loss", "psft"], {}, "--loss psft: needs reference_log_prob"),
        (["--loss", "iw-sft"], {}, "--loss iw-sft: needs reference_log_prob"),
        (["--loss", "asft"], {}, "--loss asft: needs kl"),
        (["--loss", "dft-sequence"], {}, "--loss dft-sequence: weighs by conversation"),
        (["--loss", "dft-geometric"], {}, "--loss dft-geometric: weighs by conversation"),
        (["--loss", "dft"], {"context_parallel_size": 2}, "expected --calculate-per-token-loss"),
        (
            ["--loss", "talr"],
            {"context_parallel_size": 2, "calculate_per_token_loss": True},
            "--context-parallel-size: --loss talr",
        ),
        (["--dft-floor", "0.2"], {}, "--dft-floor: belongs to --loss dft-floor"),
        (["--loss", "dft-floor", "--dft-floor", "2"], {}, "--dft-floor: expected"),
    ],
)
def test_other_refusals(words, settings, expected):
    args = flags(*words)
    vars(args).update(settings)
    with pytest.raises(ValueError) as caught:
        stock.check(args)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_context_parallel_with_per_token_loss_is_accepted():
    args = flags("--loss", "dft")
    args.context_parallel_size, args.calculate_per_token_loss = 2, True
    assert stock.check(args).name == "dft"


def test_the_flags_are_refused_while_megatron_still_parses(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--loss", "dft", "--use-mup", "--other"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--use-mup", action="store_true")
    with pytest.raises(ValueError, match="^--use-mup: "):
        stock.add_loss_flags(parser)


def test_what_megatron_sets_after_parsing_is_seen_at_the_first_batch(train_on):
    late = with_setting("modelopt_enabled", True, "--loss", "dft")
    with pytest.raises(ValueError, match="^--modelopt-enabled: "):
        train_on(given=late)


@pytest.mark.parametrize("own", [True, False])
def test_the_scripts_own_flags_are_kept(monkeypatch, capsys, own):
    words = ["--loss", "dft-mix", *(["--own", "2"] if own else [])]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
    monkeypatch.delenv("RANK", raising=False)

    def parse(first, extra_args_provider=None, defaults=None):
        parser = argparse.ArgumentParser()
        parser = extra_args_provider(parser)
        return first, defaults, parser.parse_args()

    def add_own(parser):
        parser.add_argument("--own", type=int)
        return parser

    wrapped = stock.with_loss_flags(parse)
    first, defaults, args = wrapped(1, extra_args_provider=add_own if own else None, defaults=2)
    assert (first, defaults, args.loss, getattr(args, "own", None)) == (
        1,
        2,
        "dft-mix",
        2 if own else None,
    )
    announced = "> megatron_dft: training loss dft-mix, alpha 0.5 (github Lauorie/DFT)\n"
    assert capsys.readouterr().out == announced


def test_without_our_flags_nothing_is_weighted_or_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py"])
    parser = stock.add_loss_flags(argparse.ArgumentParser())
    assert parser.parse_args([]).loss == "sft" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda loss, count: (loss / count, count),  # a mean
        lambda loss, count: (loss**2, count),  # the token losses are not just summed
        lambda loss, count: (loss, count + 1),
    ],
)
def test_a_loss_function_that_does_not_sum_is_refused(monkeypatch, spoil):
    args = flags("--loss", "dft")
    monkeypatch.setattr(stock, "get_args", lambda: args)

    def of_a_fork(loss_mask, output_tensor, model=None):
        loss, count, report = plain_loss(loss_mask, output_tensor)
        return *spoil(loss, count), report

    with pytest.raises(ValueError, match="^--loss: of_a_fork of this script was expected") as error:
        stock.weighted_loss(of_a_fork)(
            torch.tensor(MASK), torch.tensor(CROSS_ENTROPY, requires_grad=True)
        )
    assert "\n" not in str(error.value)
