"""--qat: the loss is that of rounded weights, every layout trains alike, the export is whole."""

from argparse import Namespace

import pytest
import torch

from megatron_dft.flags import quantize
from tests.chats import write_chats
from tests.hf.tiny import make_tiny
from tests.train.launch import flags, largest_relative_error, run_train, weights

NONE = dict(qat="int8", save=None, load=None, num_experts=None, fp8=None)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(save="x"), "--qat int8: not with --save; .*--save-hf"),
        (dict(load="x"), "--load; .*--hf-model"),
        (dict(num_experts=4), "--num-experts"),
        (dict(fp8="hybrid"), "--fp8-format"),
    ],
)
def test_refused_combinations(given, named, monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=named):
        quantize.check(Namespace(**(NONE | given)))
    quantize.check(Namespace(**NONE))


def test_without_modelopt_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-dft\[modelopt\]'"):
        quantize.check(Namespace(**NONE))
    quantize.check(Namespace(qat=None))


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Nearest representable value times the row's scale."""
    largest = weight.abs().amax(1, keepdim=True).double()
    if name == "int8":
        return (weight.double() * 127 / largest).round().clamp(-127, 127) * largest / 127
    return (
        (weight.double() * 448 / largest).float().to(torch.float8_e4m3fn).double() * largest / 448
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is an extra")
    out = tmp_path_factory.mktemp("qat")
    model, chats = make_tiny("qwen2", out / "model"), write_chats(out / "chats.jsonl")
    done: dict[str, tuple] = {}

    def get(qat: str | None, tp: int = 1, pp: int = 1):
        key = f"{qat}-{tp}-{pp}"
        if key not in done:
            argv = flags(
                model, chats, train_iters=3, save_hf=out / key, qat=qat,
                tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
            )  # fmt: skip
            done[key] = run_train(tp * pp, *argv), weights(out / key)
        return done[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_DFT_DATA_CACHE", str(out / "cache"))
        yield model, chats, get


@pytest.mark.parametrize("qat", ["int8", "fp8"])
def test_the_first_loss_is_that_of_rounded_weights(qat, run, tmp_path):
    """A base model that is rounded already gives the loss of --qat without --qat."""
    from safetensors.torch import load_file, save_file

    model, chats, get = run
    figures, trained = get(qat)
    plain, _ = get(None)
    base = load_file(model / "model.safetensors")
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    by_hand = {
        n: rounded(t, qat).float() if n.endswith("_proj.weight") else t for n, t in base.items()
    }
    save_file(by_hand, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = run_train(1, *flags(tmp_path, chats, train_iters=1))
    for name in ("lm loss", "dft loss"):
        assert figures[0][name] == pytest.approx(expected[0][name], abs=2e-6)
        assert abs(figures[0][name] - plain[0][name]) > 1e-5
    # What is exported is the full-precision weight, moved by the training, not a rounded one.
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(trained[name], base[name])
    assert (trained[name].double() - rounded(trained[name], qat)).abs().max() > 1e-4


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("qat", ["int8", "fp8"])
def test_layouts_train_alike(qat, tp, pp, run):
    get = run[-1]
    (expected, expected_weights), (got, trained) = get(qat), get(qat, tp, pp)
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        # A weight on the edge between two steps of the format may round either way.
        assert ours["lm loss"] == pytest.approx(theirs["lm loss"], abs=1e-4), step
    assert largest_relative_error(trained, expected_weights) <= 1e-3
