"""A perturbation of Megatron's shards is the same at every layout, and the checkpoint's own."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_dft.es.sharded import perturb
from megatron_dft.es.weights import Weights
from megatron_dft.hf.export import save_hf
from megatron_dft.hf.load import load_hf_weights
from megatron_dft.hf.source import open_checkpoint
from tests.hf import megatron_model
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks

SEED, SIGMA = 11, 0.05
# tensor and pipeline parallel sizes, and ranks; what is left of the ranks is data parallel
LAYOUTS = {"tp1": (1, 1, 1), "tp2": (2, 1, 2), "pp2": (1, 2, 2), "dp2": (1, 1, 2)}


def perturbed(directory, out, tp, pp):
    """Exports the perturbed model; this rank's weights as one vector."""
    megatron_model.start(tp, pp)
    models = megatron_model.build(directory, pad_to=16)
    checkpoint = open_checkpoint(directory)
    load_hf_weights(models, checkpoint)
    perturb(models, checkpoint, SEED, SIGMA)
    save_hf(models, checkpoint, out, card="a card")
    padding = models[0].state_dict().get("output_layer.weight")
    vector = torch.cat([p.flatten() for m in models for p in m.parameters()])
    return vector, None if padding is None else padding[-1].abs().max().item(), dist.get_rank()


def tensors(directory):
    return {n: t for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}


# A tied head is a parameter of its own on the last of several pipeline stages alone.
CASES = [("llama", layout) for layout in LAYOUTS] + [("tied", "tp2"), ("tied", "pp2")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A layout, a model, and its perturbation in transformers."""
    kind, layout = request.param
    out = tmp_path_factory.mktemp(kind)
    tied = kind == "tied"
    path = make_tiny("llama", out / "model", num_hidden_layers=2, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    Weights(model, open_checkpoint(path)).perturb(SEED, SIGMA)
    return layout, path, dict(model.named_parameters()), out


def test_the_same_perturbation_at_every_layout(case):
    layout, path, expected, out = case
    tp, pp, ranks = LAYOUTS[layout]
    results = run_ranks(perturbed, ranks, path, out / layout, tp, pp)
    found, before = tensors(out / layout), tensors(path)
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert (tensor != before[name]).float().mean() > 0.9, name
    if layout == "dp2":
        assert torch.equal(results[0][0], results[1][0])
    if "tied" not in str(path):  # the last of the padded vocabulary rows has no noise
        assert results[-1][1] == 0.0
