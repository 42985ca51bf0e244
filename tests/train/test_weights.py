"""The data's weights are factors on the tokens' losses, in every objective, route and layout."""

import json

import pytest
import torch

from tests.hf.tiny import make_tiny
from tests.train.launch import flags, run_train, weights

ROWS = [("one two", "seven is x"), ("then", "sum and two"), ("x", "is"), ("two", "and then seven")]
STEP = dict(
    train_iters=1, optimizer="sgd", sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0, lr=1.0,
    min_lr=1.0, micro_batch_size=1, global_batch_size=4,
)  # fmt: skip
LAYOUTS = {
    "tp2-sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": dict(pipeline_model_parallel_size=2),
    "dp2": {},
    "cp2": dict(context_parallel_size=2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("weights") / "model", vocab_size=259)


def _data(path, first, second):
    """Two rows whose message weighs `first`, two whose row weighs `second`."""
    with open(path, "w") as file:
        for number, (question, answer) in enumerate(ROWS):
            answered = {"role": "assistant", "content": answer}
            row = {"messages": [{"role": "user", "content": question}, answered]}
            if number < 2:
                answered["weight"] = first
            else:
                row["weight"] = second
            file.write(json.dumps(row) + "\n")
    return path


def _update(model, directory, factors, ranks=1, **given):
    """What one step of plain gradient descent does to the weights, over all of the rows."""
    from safetensors.torch import load_file

    name = "-".join(map(str, [*factors, ranks, *given.values()]))
    data = _data(directory / f"{name}.jsonl", *factors)
    out = directory / name
    run_train(ranks, *flags(model, data, save_hf=out, **(STEP | given)))
    before, after = load_file(model / "model.safetensors"), weights(out)
    return torch.cat([(after[n] - before[n]).double().flatten() for n in sorted(after)])


@pytest.mark.parametrize("loss", ["sft", "dft-geometric"])
@pytest.mark.parametrize("route", [{}, dict(loss_chunk_size=16)], ids=["logits", "head"])
def test_the_update_is_linear_in_the_weights(model, tmp_path, loss, route):
    """The normaliser is the number of supervised tokens, which no weight above 0 changes."""

    def update(*factors):
        return _update(model, tmp_path, factors, loss=loss, **route)

    both = update(1.0, 1.0)
    first = (update(3.0, 1.0) - both) / 2
    expected = 2.0 * first + 0.5 * (both - first)
    got = update(2.0, 0.5)
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    assert float((got - both).norm() / both.norm()) > 0.1


NORMALISED = dict(loss_normalizer="weights")


def test_normalised_weights_are_shares(model, tmp_path):
    """Equal weights are as none, and others are the plain sum's update by the mean weight."""

    def update(*factors, **given):
        return _update(model, tmp_path, factors, **given)

    plain = update(1.0, 1.0)
    assert float((update(2.5, 2.5, **NORMALISED) - plain).norm() / plain.norm()) < 1e-5
    summed, shared = update(3.0, 0.5), update(3.0, 0.5, **NORMALISED)
    # One answer token is one byte, and each answer's end is one token: two rows of each weight.
    first, second = (sum(len(answer) + 1 for _, answer in half) for half in (ROWS[:2], ROWS[2:]))
    expected = summed * (first + second) / (3.0 * first + 0.5 * second)
    assert float((shared - expected).norm() / expected.norm()) < 1e-4  # fp32 weights
    assert float((shared - summed).norm() / expected.norm()) > 0.1


PACKED = dict(no_packing=None, seq_length=128, global_batch_size=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [{}, PACKED], ids=["rows", "packed"])
def test_every_layout_weighs_alike(model, tmp_path, layout, rows):
    rows = rows | (NORMALISED if layout in ("dp2", "cp2") else {})  # what it crosses: replicas, CP
    expected = _update(model, tmp_path, (2.0, 0.25), **rows)
    got = _update(model, tmp_path, (2.0, 0.25), 2, **rows, **LAYOUTS[layout])
    assert float((got - expected).norm() / expected.norm()) < 1e-4
