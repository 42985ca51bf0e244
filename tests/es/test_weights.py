"""The float32 copy of a checkpoint: perturbed, restored, moved and exported."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_dft.es.noise import normal_like
from megatron_dft.es.weights import Weights
from megatron_dft.hf.source import open_checkpoint
from tests.hf.tiny import make_tiny


def stored(directory):
    return {n: t for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """As llama checkpoints are: bfloat16, the head tied to the embedding."""
    out = tmp_path_factory.mktemp("es")
    path = make_tiny("llama", out, num_hidden_layers=1, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


def opened(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model, Weights(model, open_checkpoint(directory))


def copies(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_member_is_the_weights_plus_sigma_times_its_noise(directory, dtype):
    model, weights = opened(directory, dtype)
    base = copies(model)
    weights.perturb(5, 0.1)
    for name, p in model.named_parameters():
        noise = normal_like(5, name, p).double()
        expected = base[name].double() + 0.1 * noise
        error = 2**-8 if dtype == torch.bfloat16 else 2**-22
        torch.testing.assert_close(p.double(), expected, rtol=error, atol=error)
        assert (p != base[name]).float().mean() > 0.9


def test_restoring_is_exact_after_any_number_of_members(directory):
    model, weights = opened(directory, torch.bfloat16)
    base = copies(model)
    for seed in range(4):
        weights.perturb(seed, 1.0)
    weights.restore()
    for name, p in model.named_parameters():
        assert torch.equal(p, base[name]), name


def reference(base, name, steps, alpha, decay):
    """θ in float64 after steps of (seeds, scores)."""
    now, start = base.double(), base.double()
    for seeds, scores in steps:
        noise = [normal_like(s, name, base).double() for s in seeds]
        total = sum(z * e for z, e in zip(scores, noise, strict=True))
        now = now + alpha / len(seeds) * total
        now = now - alpha * decay * (now - start)
    return now


@pytest.mark.parametrize("decay", [0.0, 40.0])
def test_the_update_equals_a_dense_float64_reference(directory, decay):
    model, weights = opened(directory)
    base = copies(model)
    steps = [([3, 4, 5], [1.2, 0.0, -1.1]), ([6, 7, 8], [-0.5, 1.4, -0.9])]
    for seeds, scores in steps:
        weights.update(seeds, scores, 0.01, decay)
    weights.restore()
    for name, p in model.named_parameters():
        expected = reference(base[name], name, steps, 0.01, decay)
        torch.testing.assert_close(p.double(), expected, rtol=1e-6, atol=1e-8)
    moved = sum((p.double() - base[n].double()).square().sum() for n, p in model.named_parameters())
    whole = sum(b.double().square().sum() for b in base.values())
    assert weights.relative_norm() == pytest.approx((moved / whole).sqrt().item(), rel=1e-5)


def test_steps_below_half_a_unit_of_bfloat16_add_up(directory):
    model, weights = opened(directory, torch.bfloat16)
    base = copies(model)["model.norm.weight"]
    size = 0.3 * 2**-8  # near 1, where weights stand 2⁻⁷ (above) or 2⁻⁸ (below) apart
    for seed in range(8):
        weights.update([seed], [1.0], size)
    weights.restore()
    now = dict(model.named_parameters())["model.norm.weight"]
    expected = reference(base, "model.norm.weight", [([s], [1.0]) for s in range(8)], size, 0)
    assert torch.equal(now, expected.to(torch.bfloat16))
    assert (now != base).any()


def test_the_export_has_the_bases_files_names_and_dtypes(directory, tmp_path):
    model, weights = opened(directory)
    weights.export(tmp_path / "same", "card")
    before, same = stored(directory), stored(tmp_path / "same")
    assert before.keys() == same.keys()
    for name, tensor in before.items():
        assert same[name].dtype == tensor.dtype and torch.equal(same[name], tensor), name
    weights.update([1], [1.0], 0.1)
    weights.export(tmp_path / "moved", "card")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)
    weights.restore()
    for (name, p), now in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, now.to(torch.bfloat16).float()), name
        assert not torch.equal(p, before[name].float()), name
    assert (tmp_path / "moved" / "tokenizer.json").exists()


def test_a_tied_head_that_is_stored_too_follows_the_embedding(directory, tmp_path):
    path = make_tiny("llama", tmp_path / "m", num_hidden_layers=1, tie_word_embeddings=True)
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    _, weights = opened(path)
    weights.update([1], [1.0], 0.1)
    weights.export(tmp_path / "out", "card")
    now = stored(tmp_path / "out")
    assert torch.equal(now["lm_head.weight"], now["model.embed_tokens.weight"])
    assert not torch.equal(now["lm_head.weight"], tensors["lm_head.weight"])


def test_what_is_saved_comes_back(directory, tmp_path):
    model, weights = opened(directory)
    weights.update([1], [1.0], 0.1)
    weights.save(tmp_path / "w.safetensors")
    again_model, again = opened(directory)
    again.load(tmp_path / "w.safetensors")
    weights.restore()
    again.restore()
    for (name, a), b in zip(model.named_parameters(), again_model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_weights_under_other_names_are_refused(tmp_path):
    """transformers fuses a Mixtral's experts: their noise would not be the checkpoint's."""
    path = make_tiny("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="in a form that the checkpoint has not"):
        Weights(model, open_checkpoint(path))
