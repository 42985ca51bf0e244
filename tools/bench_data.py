"""Speed, memory and packing of the data path, beside the tokenizer's own batch speed.

    python tools/bench_data.py --tokenizer DIR [--conversations 200000] [--work DIR]

Writes a JSONL file of conversations with log-normal lengths (median 300 tokens, sigma 1.0), then,
each in a process of its own: the tokenizer's batch encoding of the same texts, already rendered;
the whole preparation (read, check, render, tokenise, mask, write, pack); a second start out of the
cache. The first two are repeated in turn, and the best of each counts, because other work on the
machine only ever slows them down. Packing efficiency is printed beside Megatron's SFTDataset's.
"""

import argparse
import json
import os
import pydoc_data.topics
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SEQ_LENGTH = 4096


def write_conversations(path: Path, count: int, tokenizer) -> None:
    """Single- and multi-turn conversations cut out of Python's own manual."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    per_token = (
        len(text) / len(tokenizer(text[:400_000])["input_ids"]) * len(text[:400_000]) / len(text)
    )
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(300), 1.0, count), 60_000 / per_token)
    turns = rng.integers(1, 4, count)
    with open(path, "w", encoding="utf-8") as file:
        for length, n in zip(lengths, turns, strict=True):
            size = max(8, int((length - 14 * n) * per_token / (2 * n)))
            messages = []
            for turn in range(2 * n):
                start = int(rng.integers(0, len(text) - size))
                content = text[start : start + size].strip() or "?"
                messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
            file.write(json.dumps({"messages": messages}) + "\n")


def _rendered(path: Path, tokenizer) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [
            tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            for line in file
        ]


def child_tokenizer(path: Path, tokenizer, work: Path) -> dict:
    texts = _rendered(path, tokenizer)
    begin, cpu, tokens = time.perf_counter(), _cpu_seconds(), 0
    for start in range(0, len(texts), 1000):
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False)
        tokens += sum(map(len, batch["input_ids"]))
    return {
        "seconds": time.perf_counter() - begin,
        "cpu": _cpu_seconds() - cpu,
        "tokens": tokens,
    }


def child_prepare(path: Path, tokenizer, work: Path) -> dict:
    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.options import DatasetOptions

    begin, cpu = time.perf_counter(), _cpu_seconds()
    data = build_dataset(
        [path],
        tokenizer,
        DatasetOptions(seq_length=SEQ_LENGTH, overlong="drop", cache_dir=work / "cache"),
    )
    return {
        "seconds": time.perf_counter() - begin,
        "cpu": _cpu_seconds() - cpu,
        "rows": len(data),
        "conversations": len(data.conversations),
        "efficiency": data.plan.efficiency(),
    }


def child_megatron(path: Path, tokenizer, work: Path) -> dict:
    """Megatron's SFTDataset on the first 2,000 rows: one conversation a row, padded."""
    from types import SimpleNamespace

    from megatron.training.datasets.sft_dataset import SFTDataset, SFTLowLevelDataset

    class Adapter:
        eod = tokenizer.eos_token_id
        pad = -1  # an id of its own, so that padding can be counted

        def tokenize_conversation(self, messages, return_target, add_generation_prompt):
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            return np.array(ids), np.array(ids)

    head = work / "head.jsonl"
    with open(path, encoding="utf-8") as source, open(head, "w", encoding="utf-8") as target:
        rows = [line for line, _ in zip(source, range(2000), strict=False)]
        target.writelines(rows)
    config = SimpleNamespace(
        tokenizer=Adapter(), sequence_length=SEQ_LENGTH, reset_position_ids=False,
        context_parallel_size=1, create_attention_mask=False, reset_attention_mask=False,
    )  # fmt: skip
    data = object.__new__(SFTDataset)
    data.dataset, data.config = SFTLowLevelDataset(str(head)), config
    data.indices, data.num_samples = np.arange(len(rows)), len(rows)
    used = sum(int((data[i]["tokens"] != -1).sum()) for i in range(len(rows)))
    return {"efficiency": used / (len(rows) * SEQ_LENGTH)}


def _cpu_seconds() -> float:
    """Of this process and of those it waited for: what a loaded machine leaves comparable."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


CHILDREN = {
    "tokenizer": child_tokenizer,
    "prepare": child_prepare,
    "megatron": child_megatron,
}


def _run_child(name: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--work", args.work,
               "--conversations", str(args.conversations), "--child", name]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True,
        env=dict(os.environ, TOKENIZERS_PARALLELISM="true"),
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{name} failed with status {process.returncode}")
    result = json.loads(process.stdout.read().splitlines()[-1])
    return {**result, "peak_mib": peak / 2**20}


def _resident(pid: int) -> int:
    """Bytes of anonymous memory of a process and its children: mapped files are not counted."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _resident(int(child))
        for task in Path(f"/proc/{pid}/task").iterdir():
            if task.name != str(pid):
                for child in (task / "children").read_text().split():
                    total += _resident(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="directory, .model file or hub name")
    parser.add_argument("--conversations", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", help="directory; default: a fresh one")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from megatron_dft.data.tokenizer import load_tokenizer

    args.work = args.work or tempfile.mkdtemp(prefix="bench_data-")
    work = Path(args.work)
    path = work / f"conversations-{args.conversations}.jsonl"
    tokenizer = load_tokenizer(args.tokenizer)
    if args.child:
        print(json.dumps(CHILDREN[args.child](path, tokenizer, work)))
        return
    work.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_conversations(path, args.conversations, tokenizer)
    own, ours = [], []
    for _ in range(args.repeats):
        own.append(_run_child("tokenizer", args))
        for old in (work / "cache").glob("*/*"):
            subprocess.run(["rm", "-r", str(old)], check=True)
        ours.append(_run_child("prepare", args))
        print(own[-1], ours[-1], flush=True)
    again = _run_child("prepare", args)
    megatron = _run_child("megatron", args)
    best_own = min(r["seconds"] for r in own)
    best = min(r["seconds"] for r in ours)
    size = path.stat().st_size / 2**20
    print(
        f"file: {args.conversations:,} conversations, {size:.0f} MiB, {own[0]['tokens']:,} tokens"
    )
    print(f"tokenizer's own batch encoding: {best_own:.1f} s")
    print(f"whole preparation: {best:.1f} s, {best_own / best:.2f} of the tokenizer's speed, "
          f"peak {max(r['peak_mib'] for r in ours):.0f} MiB with all processes")  # fmt: skip
    own_cpu, cpu = min(r["cpu"] for r in own), min(r["cpu"] for r in ours)
    print(f"CPU time: {own_cpu:.1f} s and {cpu:.1f} s: {own_cpu / cpu:.2f}")
    print(f"second start: {again['seconds']:.2f} s")
    print(f"packing efficiency: {ours[0]['efficiency']:.4f}, Megatron's SFTDataset "
          f"{megatron['efficiency']:.4f}")  # fmt: skip
    print(f"cores: {len(os.sched_getaffinity(0))}, this process peaked at "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
