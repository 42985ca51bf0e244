"""What a run says that it runs on, and what it does where attention is not fused; on a fake TE."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_dft.training import attention, machine

_TE = """
import os
class DotProductAttention:
    calls = []
    def __init__(self, heads, dim, **given):
        self.given = dict(given, heads=heads, dim=dim)
    def __call__(self, q, k, v, **given):
        from transformer_engine.pytorch.attention import dot_product_attention as kept
        type(self).calls.append((self.given, given, q.shape, k.shape, dict(os.environ)))
        if CHOICE == "refused":
            raise ValueError("no backend supports this\\nmore")
        kept._attention_backends.update(use_flash_attention=CHOICE == "flash",
            use_fused_attention=CHOICE == "fused", use_unfused_attention=CHOICE == "unfused")
"""


@pytest.fixture
def fake_te(tmp_path, monkeypatch):
    """fake_te(choice) → the fake's recorded calls; choice: what its attention takes."""

    def make(choice):
        files = {
            "transformer_engine/__init__.py": "",
            "transformer_engine/pytorch/__init__.py": f"CHOICE = {choice!r}\n{_TE}",
            "transformer_engine/pytorch/attention/__init__.py": "",
            "transformer_engine/pytorch/attention/dot_product_attention/__init__.py": (
                "_attention_backends = {}\n"
            ),
            "transformer_engine_torch.py": "def get_cudnn_version(): return 91400\n",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return importlib.import_module("transformer_engine.pytorch").DotProductAttention.calls

    yield make
    for name in [n for n in sys.modules if n.startswith("transformer_engine")]:
        del sys.modules[name]


SHAPE = attention.AttentionShape(heads=4, groups=2, head_dim=8, dtype=torch.bfloat16)
CHOICES = {
    "fused": attention.FUSED,
    "flash": attention.FLASH,
    "unfused": attention.UNFUSED,
    "refused": "none: no backend supports this",
}


@pytest.mark.parametrize("choice", CHOICES)
def test_transformer_engine_is_asked_with_the_model_s_packed_rows(fake_te, choice):
    calls = fake_te(choice)
    assert attention.backend(SHAPE, device="cpu") == CHOICES[choice]
    ((made, called, q, k, _),) = calls
    assert (made["heads"], made["dim"], made["num_gqa_groups"]) == (4, 8, 2)
    assert called["qkv_format"] == "thd" and called["attn_mask_type"] == "padding_causal"
    assert called["cu_seqlens_q"].tolist()[-1] == q[0] and (q[1], k[1]) == (4, 2)


def test_the_attention_backend_flag_is_in_force_while_it_is_asked(fake_te, monkeypatch):
    for name in ("FLASH", "UNFUSED"):  # an earlier test of this process may have set Megatron up
        monkeypatch.delenv(f"NVTE_{name}_ATTN", raising=False)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    calls = fake_te("flash")
    shape = attention.AttentionShape(4, 2, 8, torch.bfloat16, packed=False, backend="flash")
    attention.backend(shape, device="cpu")
    ((_, called, q, _, environment),) = calls
    assert [environment[f"NVTE_{n}_ATTN"] for n in ("FLASH", "FUSED", "UNFUSED")] == list("100")
    assert called["qkv_format"] == "sbhd" and len(q) == 4
    import os

    assert os.environ["NVTE_FUSED_ATTN"] == "1" and "NVTE_FLASH_ATTN" not in os.environ


def test_the_shape_of_a_command_line(tmp_path):
    config = '{"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}'
    (tmp_path / "config.json").write_text(config)
    words = ["--hf-model", str(tmp_path), "--tensor-model-parallel-size=2", "--bf16"]
    found = attention.of_command_line(words)
    assert found == attention.AttentionShape(16, 4, 128, torch.bfloat16)
    assert attention.of_command_line(["--hf-model", "org/name"]) is None
    assert attention.of_command_line([]) is None


def test_versions_from_the_system_s_files():
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Release Build\n"
    assert machine.driver(text) == "580.65.06"
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    assert machine.driver(text) == "570.86.15" and machine.driver("") == "unknown"
    maps = (
        "7f0-7f1 r-xp 0000 00:1 2 /opt/a/libcudnn.so.9\n7f1-7f2 r-xp 0000 00:1 2 /usr/lib/libc.so\n"
        "7f2-7f3 r-xp 0000 00:1 3 /usr/b/libcudnn.so.9.14.0\n7f3-7f4 rw-p 0000 00:00 0 \n"
    )
    assert machine.libraries(maps, "cudnn") == ["/opt/a", "/usr/b"]


def test_two_cudnn_are_named(fake_te, monkeypatch):
    fake_te("fused")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert machine.cudnn() == "9.19.0 (torch), 9.14.0 (Transformer Engine): TWO on the path"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """machine.report as where attention is `chosen`; → (status or None, stderr, stdout)."""

    def run(chosen, capsys, local_rank="0", **given):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(machine, "describe", lambda chosen, rows: [f"{rows}: {chosen}"])
        monkeypatch.setattr(attention, "of_args", lambda args: SHAPE)
        monkeypatch.setattr(attention, "backend", lambda shape: chosen)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("RANK", local_rank)
        plain = {"transformer_impl": "transformer_engine", "no_packing": False,
                 "require_fused_attention": False}  # fmt: skip
        status = None
        try:
            machine.report(SimpleNamespace(**{**plain, **given}))
        except SystemExit as leaving:
            status = leaving.code
        said = capsys.readouterr()
        return status, said.err, said.out

    return run


def test_fused_attention_is_said_and_nothing_else(on_a_gpu, capsys):
    assert on_a_gpu(attention.FUSED, capsys) == (None, "", "> packed rows: fused (cuDNN)\n")


def test_unfused_attention_is_a_warning_with_the_remedy(on_a_gpu, capsys):
    status, warned, _ = on_a_gpu(attention.UNFUSED, capsys)
    assert status is None and "warning: attention is unfused" in warned
    assert "LD_LIBRARY_PATH" in warned


@pytest.mark.parametrize("local_rank", ["0", "3"])
def test_required_fused_attention_ends_the_run_on_every_rank(on_a_gpu, capsys, local_rank):
    status, said, _ = on_a_gpu(attention.UNFUSED, capsys, local_rank, require_fused_attention=True)
    assert status == 2
    assert ("--require-fused-attention: expected fused" in said) is (local_rank == "0")


def test_a_cpu_is_said_too():
    from megatron_dft.cpu import runtime
    from tests.ranks import run_ranks

    assert "running on the CPU over gloo" in run_ranks(_on_the_cpu, 1)[0][0]
    assert not runtime.is_active()


def _on_the_cpu():
    from megatron_dft.cpu import runtime

    runtime.activate()
    return machine.describe(None)
