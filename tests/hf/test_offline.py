"""torch_dist in and out without a model: bytes, layouts, Megatron's loader, refusals, kills."""

import os
import signal
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch

from megatron_dft.commands import export_hf as export_command
from megatron_dft.commands import import_hf as import_command
from megatron_dft.hf import directory as hf_directory
from megatron_dft.hf.source import open_checkpoint
from tests.hf import megatron_model
from tests.hf.test_load_errors import K_PROJ, add, edited
from tests.hf.test_round_trip import (
    VOCABULARY,
    assert_same_bytes,
    tokens,
    transformers_logits,
    whole_logits,
)
from tests.hf.tiny import KINDS, make_tiny
from tests.ranks import run_ranks


def convert(directories: dict[str, Path], out: Path) -> None:
    """Import each model, then export it again: OUT/kind and OUT/kind-back."""
    from megatron_dft.hf.convert_export import export_checkpoint
    from megatron_dft.hf.convert_import import import_checkpoint

    for kind, directory in directories.items():
        checkpoint = open_checkpoint(directory)
        import_checkpoint(checkpoint, out / kind)
        export_checkpoint(out / kind, checkpoint, out / f"{kind}-back")


def apart(function, *args, **kwargs):
    """Run in a process of its own, which has imported Megatron already."""
    return run_ranks(function, 1, *args, init=False, **kwargs)[0]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """kind -> (Hugging Face directory, torch_dist directory, directory exported from that)."""
    out = tmp_path_factory.mktemp("offline")
    models = {
        kind: make_tiny(kind, out / "hf" / kind, vocab_size=VOCABULARY, max_shard_size="60KB")
        for kind in KINDS
    }
    apart(convert, models, out)
    return {kind: (models[kind], out / kind, out / f"{kind}-back") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_comes_back(kind, imported):
    source, _, back = imported[kind]
    assert_same_bytes(back, source)


def verify_all(pairs: dict[str, tuple[Path, Path]]) -> dict[str, tuple[float, float]]:
    """kind -> largest difference of the logits that --verify compares, and the largest logit."""
    from megatron_dft.commands import compare_logits
    from megatron_dft.cpu import runtime

    runtime.activate()
    found = {}
    for kind, (source, torch_dist) in pairs.items():
        ids = compare_logits._prompt(source)
        theirs = compare_logits._transformers_logits(source, ids)
        ours = compare_logits._megatron_logits(source, torch_dist, ids)
        found[kind] = (float((ours - theirs).abs().max()), float(theirs.abs().max()))
    return found


def test_verify_computes_what_transformers_does(imported):
    found = apart(verify_all, {kind: (hf, dist) for kind, (hf, dist, _) in imported.items()})
    assert set(found) == set(KINDS)
    for kind, (difference, largest) in found.items():
        assert difference <= 1e-5 * largest, kind


def load_all(directories: dict[str, Path], sources: dict[str, Path], tp: int, pp: int):
    """Megatron's own reader fills a model of this layout; logits of the last stage."""
    from megatron.core import dist_checkpointing, parallel_state

    megatron_model.start(tp, pp)
    logits = {}
    for kind, source in sources.items():
        (model,) = megatron_model.build(source)
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
        path = str(directories[kind] / "release")
        content = dist_checkpointing.load_content_metadata(path)
        state = {"model": model.sharded_state_dict(metadata={**content, **groups})}
        model.load_state_dict(dist_checkpointing.load(state, path)["model"])
        assert not any(p.isnan().any() for p in model.parameters())
        logits[kind] = megatron_model.logits([model], tokens())
    return logits


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_megatron_loads_an_import_at_any_layout(tp, pp, imported):
    kinds = ("llama", "qwen2", "qwen3-moe", "deepseek-v3", "gemma2", "gemma3")
    sources = {k: imported[k][0] for k in kinds}
    results = run_ranks(load_all, tp * pp, {k: imported[k][1] for k in kinds}, sources, tp, pp)
    for kind in kinds:
        expected = transformers_logits(sources[kind])
        error = (whole_logits([r[kind] for r in results], tp) - expected).abs().max().item()
        assert error <= 1e-5, (kind, error)


def save_torch_dist(sources: dict[str, Path], out: Path, layout, pad_to: int, groups) -> None:
    """What training leaves: weights of a sharded model with padded vocabulary, by Megatron."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_dft.hf.load import load_hf_weights

    tp, pp, vpp = layout
    megatron_model.start(tp, pp, vpp, **groups)
    for kind, source in sources.items():
        models = megatron_model.build(source, vpp=vpp, pad_to=pad_to)
        load_hf_weights(models, open_checkpoint(source))
        content = {"singleton_local_shards": False}
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
        state: dict = {"args": Namespace(hf_model=str(source), loss="dft", lr=1e-5)}
        for i, model in enumerate(models):
            key = "model" if vpp is None else f"model{i}"
            state[key] = model.sharded_state_dict(metadata={**content, **groups})
        directory = out / kind / "iter_0000007"
        directory.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(directory), content_metadata=content)
        (out / kind / "latest_checkpointed_iteration.txt").write_text("7")


def export_all(sources: dict[str, Path], out: Path) -> None:
    from megatron_dft.hf.convert_export import export_checkpoint

    for kind, source in sources.items():
        export_checkpoint(out / kind, open_checkpoint(source), out / f"{kind}-back")


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        ((2, 1, None), {}),
        ((2, 2, None), {}),
        ((1, 2, 2), {}),
        ((2, 1, None), dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
    ],
    ids=str,
)
def test_export_of_what_megatron_saved_at_a_layout(layout, groups, imported, tmp_path):
    kinds = ["qwen3-moe", "deepseek-v3"]
    if not groups:
        kinds += ["llama", "llama-tied", "gemma3"]
    sources = {k: imported[k][0] for k in kinds}
    run_ranks(save_torch_dist, layout[0] * layout[1], sources, tmp_path, layout, 128, groups)
    apart(export_all, sources, tmp_path)
    for kind in kinds:
        assert_same_bytes(tmp_path / f"{kind}-back", sources[kind])


def command(module, *words: str) -> str:
    """The message of a refused command, or what it printed."""
    import contextlib
    import io

    parser = ArgumentParser()
    module.add_arguments(parser)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            assert module.run(parser.parse_args(words)) == 0
    except ValueError as error:
        assert "\n" not in str(error)
        return f"refused: {error}"
    return printed.getvalue()


def commands(calls: list[tuple[str, list[str]]]) -> list[str]:
    modules = {"import": import_command, "export": export_command}
    return [command(modules[name], *words) for name, words in calls]


def damage(tensors):
    tensors[K_PROJ][0, 0] = float("nan")


def test_commands(imported, tmp_path):
    source, torch_dist, _ = imported["llama"]
    broken = edited(make_tiny("llama", tmp_path / "nan", num_hidden_layers=2), damage)
    extra = edited(
        make_tiny("llama", tmp_path / "extra", num_hidden_layers=2),
        lambda t: add(t, "model.layers.0.self_attn.o_proj.bias", torch.zeros(32)),
    )
    other = make_tiny("llama", tmp_path / "other", vocab_size=VOCABULARY, num_hidden_layers=3)
    wide = make_tiny("llama", tmp_path / "wide", vocab_size=VOCABULARY + 1)
    rope = dict(KINDS["llama3"][1]["rope_parameters"], factor=32.0)
    far = make_tiny("llama3", tmp_path / "far", num_hidden_layers=1, rope_parameters=rope)
    out = tmp_path / "out"
    calls: list[tuple[str, list[str], list[str]]] = [
        ("import", [str(source), str(out / "a")], ["--load", "--num-layers 4", "--swiglu"]),
        ("import", [str(source), str(out / "a")], ["refused", "--overwrite"]),
        ("import", [str(source), str(out / "a"), "--overwrite"], ["written"]),
        ("import", [str(broken), str(out / "b")], ["refused", K_PROJ, "NaN"]),
        ("import", [str(extra), str(out / "c")], ["refused", "o_proj.bias", "fits nowhere"]),
        ("import", [str(tmp_path / "none"), str(out / "d")], ["refused", "neither a directory"]),
        ("export", [str(torch_dist), str(out / "e")], ["written"]),
        ("export", [str(torch_dist), str(out / "f"), "--dtype", "bf16"], ["written"]),
        ("export", [str(tmp_path), str(out / "g")], ["refused", "no Megatron checkpoint"]),
        (
            "export",
            [str(torch_dist), str(out / "h"), "--hf-model", str(other)],
            ["refused", "[4, ", "[3, "],
        ),
        (
            "export",
            [str(torch_dist), str(out / "i"), "--hf-model", str(wide)],
            ["refused", "embedding", "[277, 32]", "[278, 32]"],
        ),
        (
            "import",
            [str(imported["gemma3"][0]), str(out / "j")],
            ["no flags of stock Megatron build Gemma3ForCausalLM", "megatron_dft.train"],
        ),
        (
            "import",
            [str(far), str(out / "k")],
            ["--rope-scaling-factor 32", "logits will be wrong"],
        ),
    ]
    env = dict(HF_HUB_OFFLINE="1")
    answers = apart(commands, [(name, words) for name, words, _ in calls], env=env)
    for (name, words, expected), answer in zip(calls, answers, strict=True):
        for word in expected:
            assert word in answer, (name, words, answer)
    assert_same_bytes(out / "e", source)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == list("aefjk")
    assert open_checkpoint(out / "f").config["dtype"] == "bfloat16"
    card = (out / "e" / "README.md").read_text()
    assert str(source.parent) not in card and source.name in card  # no path of this machine


def import_until_killed(directory: Path, out: Path, point: str) -> None:
    from megatron_dft.hf import torch_dist
    from megatron_dft.hf.convert_import import import_checkpoint

    owner, name = {
        "weights": (torch_dist.TorchDistWriter, "write_object"),
        "metadata": (torch_dist.TorchDistWriter, "close"),
        "rename": (hf_directory, "_replace"),
    }[point]
    setattr(owner, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    import_checkpoint(open_checkpoint(directory), out)


@pytest.mark.parametrize("point", ["weights", "metadata", "rename"])
def test_kill_leaves_nothing_that_looks_whole(point, imported, tmp_path):
    with pytest.raises(TimeoutError):
        apart(import_until_killed, imported["llama"][0], tmp_path / "out", point)
    assert not (tmp_path / "out").exists()
