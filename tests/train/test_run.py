"""What a run does beside training: evaluation, exports, empty micro-batches, padded vocabulary."""

import pytest
import torch

from megatron_dft.drift.run_log import read_runs
from tests.train.launch import flags, largest_relative_error, run_train, scalars, weights

SEQ = 64


class _OneSilentReplica(torch.utils.data.Dataset):
    """Rows 1, 3, 5 … have no supervised token: of two replicas the second has none at all."""

    def __init__(self, silent):
        self.silent = silent

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 256, (SEQ + 1,), generator=draw)
        mask = torch.zeros(SEQ)
        if not (self.silent and index % 2):
            mask[20 : 30 + index % 7] = 1
        return {
            "tokens": tokens[:-1].clone(),
            "labels": tokens[1:].clone(),
            "loss_mask": mask,
            "position_ids": torch.arange(SEQ),
        }


def _silent():
    _use(_OneSilentReplica(True))


def _use(data):
    from megatron_dft.training import data_provider

    def provider(num_samples, vp_stage=None):
        return data, None, None

    provider.is_distributed = True
    data_provider.datasets_provider = provider


@pytest.mark.parametrize("layout", [{}, dict(use_distributed_optimizer=True)])
def test_a_replica_without_a_supervised_token(tiny_model, chats, tmp_path, layout):
    """Finite, no hang, and the mean is over the tokens that exist: as one process has it."""
    common = dict(micro_batch_size=1, global_batch_size=2, loss="dft", train_iters=4)
    one = run_train(
        1, *flags(tiny_model, chats, save_hf=tmp_path / "one", **common), before=_silent
    )
    two = run_train(
        2,
        *flags(tiny_model, chats, save_hf=tmp_path / "two", **common, **layout),
        before=_silent,
    )
    for ours, theirs in zip(two, one, strict=True):
        for name in ("lm loss", "dft loss", "grad_norm", "dft/mean-prob"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert two[0]["lm loss"] == pytest.approx(5.5, abs=1.5)
    assert largest_relative_error(weights(tmp_path / "two"), weights(tmp_path / "one")) <= 1e-5


def test_padded_vocabulary_rows_take_no_probability(tiny_model, chats, tmp_path):
    """259 tokens padded to 320 and to 512: the same losses, accuracy and weights."""
    runs = {}
    for multiple, layout in ((1, {}), (160, dict(tensor_model_parallel_size=2)), (512, {})):
        out = tmp_path / str(multiple)
        argv = flags(
            tiny_model, chats, make_vocab_size_divisible_by=multiple, save_hf=out, **layout
        )
        runs[multiple] = run_train(2 if layout else 1, *argv), weights(out)
    expected, expected_weights = runs[1]
    for multiple in (160, 512):
        got, trained = runs[multiple]
        for ours, theirs in zip(got, expected, strict=True):
            assert ours["lm loss"] == pytest.approx(theirs["lm loss"], abs=1e-5)
            assert ours["dft/mean-prob"] == pytest.approx(theirs["dft/mean-prob"], abs=1e-6)
        assert largest_relative_error(trained, expected_weights) <= 1e-5


def test_evaluation_is_plain_cross_entropy(tiny_model, chats, tmp_path):
    """The validation figures of a DFT run are the cross entropies that transformers computes: of
    --valid-data whole, once, and of each of its items; no flag is needed."""
    from transformers import AutoModelForCausalLM

    from tests.train import reference

    log, some = tmp_path / "log", tmp_path / "some.jsonl"
    some.write_text("".join(chats.read_text().splitlines(keepends=True)[:7]))
    run_train(
        2,
        *flags(
            tiny_model,
            chats,
            valid_data=[chats, some],
            tensor_model_parallel_size=2,
            lr=1e-9,
            min_lr=1e-9,
            tensorboard_dir=log,
        ),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    logged, sums = scalars(log), torch.zeros(2)
    for path in (chats, some):
        own = torch.zeros(2)
        for ids, trained in reference.read_rows(tiny_model, path):
            tokens, mask = torch.tensor(ids), torch.tensor(trained[1:], dtype=torch.float32)
            with torch.no_grad():
                logits = model(tokens[None, :-1]).logits[0]
            ce = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            own += torch.stack([(ce * mask).sum(), mask.sum()])
        expected = float(own[0] / own[1])
        assert logged[f"lm loss of {path} validation"] == pytest.approx(expected, abs=1e-4)
        sums += own
    assert logged["lm loss validation"] == pytest.approx(float(sums[0] / sums[1]), abs=1e-4)
    assert 0 < logged["dft/end-prob validation"] < 1
    assert "dft loss validation" not in logged
    # What `megatron-dft compare` reads of Megatron's own event file.
    (run,) = read_runs([log])
    assert run.settings["loss"] == "dft" and run.number("lr") == 1e-9 and run.step == 5
    assert run.figures["lm loss validation"][5] == logged["lm loss validation"]
    assert {"lm loss", "dft/mean-prob validation", "dft/token-accuracy validation", "grad-norm",
            "learning-rate"} <= run.figures.keys()  # fmt: skip


def test_epochs_are_steps_of_the_data(tiny_model, chats):
    """48 rows, 8 a step: an epoch and a quarter is 60 rows, so 8 steps, the last one whole."""
    found = run_train(2, *flags(tiny_model, chats, train_iters=None, train_epochs=1.25))
    assert len(found) == 8


def test_exports_at_an_interval_and_at_the_end_load_in_transformers(tiny_model, chats, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    argv = flags(tiny_model, chats, save_hf=out, save_hf_interval=2, save_hf_dtype="bfloat16")
    run_train(2, *argv, "--pipeline-model-parallel-size", "2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-step-2", "out-step-4"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template
    card = (out / "README.md").read_text()
    for word in ("dft", "2508.05629", "lm loss", chats.name, "0.001"):
        assert word in card, word
    assert str(tmp_path) not in card and str(tiny_model) not in card
    early, late = weights(tmp_path / "out-step-2"), weights(out)
    assert any(not torch.equal(early[name], late[name]) for name in late)


def _inert_gradient():
    """A cross entropy whose backward ignores its upstream gradient, as fused kernels have done."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    plain = GPTModel.compute_language_model_loss

    class Inert(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.ones_like(grad)

    GPTModel.compute_language_model_loss = lambda self, labels, logits: Inert.apply(
        plain(self, labels, logits)
    )


def test_the_self_test_stops_a_run_whose_weight_does_not_reach_the_gradient(tiny_model, chats):
    argv = flags(tiny_model, chats, loss="dft", tensor_model_parallel_size=2)
    with pytest.raises(RuntimeError, match="self-test failed"):
        run_train(2, *argv, before=_inert_gradient)
