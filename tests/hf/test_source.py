"""What a checkpoint can have wrong: each gets one line that names the file, and nothing is run."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dft.hf.config import megatron_args
from megatron_dft.hf.source import open_checkpoint
from megatron_dft.storage.safetensors import Reader, read_header
from megatron_dft.storage.safetensors_writer import Writer
from tests.hf.tiny import make_tiny


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_tiny("llama", tmp_path / "model", num_hidden_layers=1)


def refusal(directory: Path, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        open_checkpoint(directory, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(directory: Path, **changes) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_index_names_every_tensor(tiny):
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.architecture == "LlamaForCausalLM"
    info = checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"]
    assert info.shape == (16, 32) and info.dtype == torch.float32
    assert len(checkpoint.tensors) == 12


def test_settings_fill_in_what_config_json_leaves_out(tiny):
    edit(tiny, num_key_value_heads=..., rope_parameters=..., rope_theta=77.0)
    settings = open_checkpoint(tiny).settings
    assert settings["num_key_value_heads"] == 4
    assert settings["rope_parameters"]["rope_theta"] == 77.0


def test_not_found_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(tmp_path / "nowhere")
    assert "nowhere" in message and "config.json" in message
    assert "no-such-model" in refusal("someone/no-such-model", revision="abc")


def test_revision_of_a_directory(tiny):
    assert "--hf-revision main" in refusal(tiny, revision="main")


def test_no_config(tiny):
    (tiny / "config.json").unlink()
    assert "no config.json" in refusal(tiny)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', ""])
def test_malformed_config(tiny, text):
    (tiny / "config.json").write_text(text)
    assert "config.json" in refusal(tiny)


def test_remote_code_is_refused_unless_trusted(tiny):
    (tiny / "modeling.py").write_text("raise SystemExit('executed')")
    edit(tiny, auto_map={"AutoConfig": "modeling.Config"})
    assert "--trust-remote-code" in refusal(tiny)
    assert open_checkpoint(tiny, trust_remote_code=True).settings["vocab_size"] == 259


def test_architectures_must_be_one(tiny):
    edit(tiny, architectures=...)
    assert "architectures" in refusal(tiny)


def test_quantised_weights(tiny):
    edit(tiny, quantization_config={"quant_method": "fp8"})
    assert "quantised" in refusal(tiny)


class Bomb:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('exploded').write_text('!')",)


def test_pickled_weights_are_not_opened(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refusal(tiny)
    assert "pickled" in message and "save_pretrained" in message
    assert not (tiny / "exploded").exists()


def test_no_weights(tiny):
    (tiny / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(tiny)


@pytest.mark.parametrize("drop", [1, 1000, "header"])
def test_truncated_file(tiny, drop):
    file = tiny / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:100] if drop == "header" else data[:-drop])
    message = refusal(tiny)
    assert "model.safetensors" in message and "fetch it again" in message


def test_garbage_after_the_data(tiny):
    with open(tiny / "model.safetensors", "ab") as f:
        f.write(b"x")
    assert "corrupt" in refusal(tiny)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
    ],
)
def test_malformed_header(tiny, header):
    (tiny / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    assert "malformed safetensors header" in refusal(tiny)


def shard(directory: Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors"])
def test_index_that_leaves_the_directory(tiny, name):
    save_file({"a": torch.zeros(1)}, tiny.parent / "x.safetensors")
    shard(tiny, {"a": name})
    assert repr(name) in refusal(tiny)


def test_index_that_names_a_pickle(tiny):
    (tiny / "x.bin").write_bytes(pickle.dumps(Bomb()))
    shard(tiny, {"a": "x.bin"})
    assert "x.bin" in refusal(tiny)


def test_index_that_names_a_missing_file(tiny):
    shard(tiny, {"a": "model-00001-of-00002.safetensors"})
    assert "model-00001-of-00002.safetensors, which is missing" in refusal(tiny)


def test_index_without_a_map(tiny):
    (tiny / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refusal(tiny)


def test_tensor_in_two_files(tiny):
    save_file({"lm_head.weight": torch.zeros(1)}, tiny / "b.safetensors")
    shard(tiny, {"lm_head.weight": "model.safetensors", "model.norm.weight": "b.safetensors"})
    assert "'lm_head.weight'" in refusal(tiny)


def test_two_models_in_one_directory(tiny):
    save_file({"a": torch.zeros(1)}, tiny / "model-00001-of-00001.safetensors")
    shard(tiny, {"a": "model-00001-of-00001.safetensors"})
    assert "two models: model.safetensors, and" in refusal(tiny)
    (tiny / "model.safetensors").unlink()
    assert open_checkpoint(tiny).tensors.keys() == {"a"}


def test_weights_that_transformers_would_not_load(tiny):
    edit(tiny, transformers_weights="other.safetensors")
    assert "'other.safetensors'" in refusal(tiny)
    edit(tiny, transformers_weights=None)
    open_checkpoint(tiny)
    (tiny / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    assert "holds an adapter (adapter_config.json)" in refusal(tiny)


def test_unknown_model_type_and_architecture(tiny):
    edit(tiny, model_type="no-such")
    with pytest.raises(ValueError, match="'no-such'"):
        megatron_args(open_checkpoint(tiny))
    edit(tiny, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ValueError, match="'GPT2LMHeadModel' is not mapped"):
        megatron_args(open_checkpoint(tiny))


def test_config_that_transformers_refuses(tiny):
    edit(tiny, num_attention_heads="many")
    with pytest.raises(ValueError, match="config.json"):
        megatron_args(open_checkpoint(tiny))


def test_reader_returns_the_bytes_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_dft.storage.safetensors._BLOCK_BYTES", 64)
    tensors = {
        "a": torch.arange(60.0).view(12, 5),
        "b": torch.randn(7, 3, 2).to(torch.bfloat16),
        "c": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    with Reader() as reader:
        for name, tensor in tensors.items():
            n = tensor.shape[0]
            parts = [rows for _, rows in reader.blocks(header[name], 1, n)]
            assert torch.equal(torch.cat(parts), tensor[1:])
        assert len(list(reader.blocks(header["a"], 0, 12))) == 4


def test_a_file_that_shrinks_while_open_raises(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    with Reader() as reader:
        list(reader.blocks(info, 0, 1))
        with open(tmp_path / "x.safetensors", "r+b") as f:
            f.truncate(2000)
        with pytest.raises(ValueError, match="shrank"):
            list(reader.blocks(info, 0, 1000))


def test_writer_is_read_by_safetensors(tmp_path):
    from safetensors.torch import load_file

    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int64)}
    contents = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    writer = Writer(tmp_path / "x.safetensors", contents)
    for name in ("a", "b"):  # any order
        writer.write(name, tensors[name])
    writer.close()
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_writer_refuses_an_incomplete_file(tmp_path):
    writer = Writer(tmp_path / "x.safetensors", {"a": ((2,), torch.float32)})
    with pytest.raises(ValueError, match="12 bytes to write where 8"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="not written, or not once: .'a'"):
        writer.close()


def test_an_index_may_name_what_lies_nowhere_but_not_elsewhere(tmp_path):
    """Rotary buffers that are no longer written; what a parameter needs is missed later."""
    tiny = make_tiny("llama", tmp_path / "model", num_hidden_layers=1, max_shard_size="20KB")
    file = tiny / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shards[0]
    file.write_text(json.dumps(index))
    assert len(open_checkpoint(tiny).tensors) == 12
    name = "model.norm.weight"
    index["weight_map"][name] = next(s for s in shards if s != index["weight_map"][name])
    file.write_text(json.dumps(index))
    assert repr(name) in refusal(tiny) and "fetch both again" in refusal(tiny)


def test_deepseek_without_latent_queries(tmp_path):
    tiny = make_tiny("deepseek-v3", tmp_path / "model", num_hidden_layers=1, q_lora_rank=None)
    with pytest.raises(ValueError, match="q_lora_rank None") as caught:
        megatron_args(open_checkpoint(tiny))
    assert "\n" not in str(caught.value)
