"""examples/configs: what every configuration asks for, and that each starts, rehearsed on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.rehearsal import stand_in
from megatron_dft.drift.run_log import read_runs

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (ROOT / "examples/configs").glob("*.sh") if p.name != "recipe.sh")
IDS = [path.stem for path in CONFIGS]
FAMILY = {
    "qwen2.5-math-1.5b": "Qwen2ForCausalLM", "qwen2.5-math-7b": "Qwen2ForCausalLM",
    "qwen2.5-32b": "Qwen2ForCausalLM", "qwen3-30b-a3b": "Qwen3MoeForCausalLM",
    "llama-3.1-8b": "LlamaForCausalLM", "llama-3.1-70b": "LlamaForCausalLM",
    "long-context": "LlamaForCausalLM", "deepseek-math-7b": "LlamaForCausalLM",
}  # fmt: skip


def local(config: Path, run_dir: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    """examples/local.sh from another directory, with nothing of this environment in its way."""
    given = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", ROOT / "examples/local.sh", *words, config],
        env=given | {"RUN_DIR": str(run_dir)} | env,
        cwd=run_dir.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_configuration_evaluates_logs_and_overlaps(config, tmp_path):
    run_dir, env = tmp_path / "run", {"TRAIN_DATA": "x.jsonl", "PROCS_PER_NODE": "2"}
    env["PYTHON"] = "true"  # the trainer's own checks want the model
    words = local(config, run_dir, "--dry-run", **env).stdout.split()
    assert f"{run_dir}/tensorboard" == words[words.index("--tensorboard-dir") + 1]
    assert "0.01" == words[words.index("--valid-share") + 1] and "--valid-data" not in words
    assert {"--eval-interval", "--overlap-grad-reduce", "--overlap-param-gather"} <= set(words)
    words = local(config, run_dir, "--dry-run", **env, VALID_DATA="v.jsonl").stdout.split()
    assert "v.jsonl" == words[words.index("--valid-data") + 1] and "--valid-share" not in words
    # A template where the model's tokenizer has none, and nowhere else.
    name = words[words.index("--hf-model") + 1]
    has_own = stand_in.tokenizer(name).chat_template is not None
    assert has_own == ("--chat-template" not in words)
    if not has_own:
        assert Path(words[words.index("--chat-template") + 1]).is_file()


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]


def test_the_template_of_llama_3_is_that_of_its_instruct_models():
    words = stand_in.tokenizer("meta-llama/Llama-3.1-8B-Instruct")
    text = words.apply_chat_template(MESSAGES, tokenize=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
    )
    asked = words.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked) and asked.endswith("assistant<|end_header_id|>\n\n")


def test_the_template_of_deepseek_math_is_that_of_its_instruct_model():
    words = stand_in.tokenizer("deepseek-ai/deepseek-math-7b-base")
    template = (ROOT / "examples/configs/templates/deepseek-math.jinja").read_text()
    text = words.apply_chat_template(MESSAGES, tokenize=False, chat_template=template)
    assert text == (
        "<｜begin▁of▁sentence｜>Be brief.\n\nUser: 1 + 1?\n\nAssistant: 2<｜end▁of▁sentence｜>"
    )
    asked = words.apply_chat_template(
        MESSAGES[:2], tokenize=False, chat_template=template, add_generation_prompt=True
    )
    assert text.startswith(asked) and asked.endswith("\n\nAssistant:")


def rehearsed(config: Path, run_dir: Path) -> None:
    """It trains, evaluates, logs, saves and exports a model of its family."""
    ended = local(config, run_dir, "--rehearse")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert (run_dir / "status").read_text() == "finished 3\n"
    (run,) = read_runs([run_dir])
    assert sorted(run.figures["lm loss"]) == [1, 2, 3]
    assert sorted(run.figures["lm loss validation"]) == [2, 3]
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
    config_json = json.loads((run_dir / "hf" / "config.json").read_text())
    assert config_json["architectures"] == [FAMILY[config.stem]]
    assert (run_dir / "hf" / "chat_template.jinja").is_file()


def test_a_base_model_s_configuration_rehearsed(tmp_path):
    rehearsed(ROOT / "examples/configs/deepseek-math-7b.sh", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_configuration_rehearsed(config, tmp_path):
    rehearsed(config, tmp_path / "run")


def test_a_rehearsal_without_a_model_is_one_line(tmp_path):
    config = tmp_path / "mine.sh"
    config.write_text("TRAIN_ARGS=(--loss dft)\n")
    ended = local(config, tmp_path / "run", "--rehearse")
    assert ended.returncode == 2
    assert ended.stderr == f"error: {config}: expected --hf-model in TRAIN_ARGS, got none\n"
