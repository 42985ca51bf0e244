"""Speed and memory of the offline converters beside `cp`, on random Qwen2.5-shaped bf16 models.

`python tools/convert_speed.py --sizes 0.5B 1.5B 3B --directory DIR` prints one row a size:
bytes/s of cp, import and export (each the median of `--repeats` interleaved runs, caches warm, data
flushed to the disk), and each converter's peak memory beyond its imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that is not installed

# hidden, intermediate, layers, heads, key-value heads, tied
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
}
VOCABULARY = 151_936


def make_model(directory: Path, size: str) -> int:
    """Write the random model tensor by tensor; returns the bytes of its weights."""
    import torch

    from megatron_dft.storage.safetensors_writer import Writer

    hidden, ffn, layers, heads, groups, tied = SHAPES[size]
    width = hidden // heads
    config = dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        torch_dtype="bfloat16",
    )
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (heads * width, hidden),
            p + "self_attn.q_proj.bias": (heads * width,),
            p + "self_attn.o_proj.weight": (hidden, heads * width),
            p + "mlp.gate_proj.weight": (ffn, hidden),
            p + "mlp.up_proj.weight": (ffn, hidden),
            p + "mlp.down_proj.weight": (hidden, ffn),
        }
        for name in ("k", "v"):
            shapes[p + f"self_attn.{name}_proj.weight"] = (groups * width, hidden)
            shapes[p + f"self_attn.{name}_proj.bias"] = (groups * width,)
    contents = {n: (s, torch.bfloat16) for n, s in shapes.items()}
    writer = Writer(directory / "model.safetensors", contents)
    for name, shape in shapes.items():
        writer.write(name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02))
    writer.close()
    return (directory / "model.safetensors").stat().st_size


def warm(directory: Path) -> None:
    """Have the files in the page cache; the converters leave none of what they write there."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as f:
                while f.read(2**20):
                    pass


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp` and flushing its output take."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - start


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def convert(what: str, source: str, base: str, out: str) -> None:
    """Child process: one conversion; prints seconds and peak bytes beyond the imports as JSON."""
    from megatron_dft.hf.convert_export import export_checkpoint
    from megatron_dft.hf.convert_import import import_checkpoint
    from megatron_dft.hf.source import open_checkpoint

    checkpoint = open_checkpoint(base)
    checkpoint.settings  # noqa: B018  transformers is imported here
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = _status("VmRSS")
    start = time.perf_counter()
    if what == "import":
        import_checkpoint(checkpoint, out, overwrite=True)
    else:
        export_checkpoint(source, checkpoint, out, overwrite=True)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": _status("VmHWM") - before}))


def run_child(what: str, source: Path, base: Path, out: Path) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-W", "ignore", __file__, "--child", what, source, base, out]
    done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--directory", type=Path, help="default: a fresh one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        convert(*args.child)
        return
    directory = args.directory or Path(tempfile.mkdtemp(prefix="convert_speed-"))
    print("| model | GB | cp MB/s | import MB/s | export MB/s | import/cp | export/cp |", end="")
    print(" import peak MiB | export peak MiB |\n|" + "---|" * 9)
    for size in args.sizes:
        root = directory / size
        shutil.rmtree(root, ignore_errors=True)
        base, torch_dist = root / "hf", root / "torch_dist"
        nbytes = make_model(base, size)
        times: dict[str, list[float]] = {"cp": [], "import": [], "export": []}
        peaks = {"import": 0.0, "export": 0.0}
        for _ in range(args.repeats):
            warm(base)
            times["cp"].append(copy(base, root / "copy"))
            shutil.rmtree(root / "copy")
            for what, out in (("import", torch_dist), ("export", root / "back")):
                warm(base if what == "import" else torch_dist)
                result = run_child(what, torch_dist, base, out)
                times[what].append(result["seconds"])
                peaks[what] = max(peaks[what], result["peak"])
        same = sum(f.stat().st_size for f in (root / "back").glob("*.safetensors"))
        assert abs(same - nbytes) < 10**6, "export and source differ in size"
        rate = {k: nbytes / statistics.median(v) / 1e6 for k, v in times.items()}
        print(
            f"| {size} | {nbytes / 1e9:.2f} | {rate['cp']:.0f} | {rate['import']:.0f} | "
            f"{rate['export']:.0f} | {rate['import'] / rate['cp']:.2f} | "
            f"{rate['export'] / rate['cp']:.2f} | {peaks['import'] / 2**20:.0f} | "
            f"{peaks['export'] / 2**20:.0f} |",
            flush=True,
        )
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
