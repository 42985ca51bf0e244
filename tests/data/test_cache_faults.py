"""A cache that is damaged, old, or cannot be written."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dft.data import prepare, workers
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.cached import prepared, same_store, some_rows
from tests.data.fixtures import chatml_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def _file(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "a.jsonl", some_rows(20))


def test_a_cache_that_became_read_only_still_serves(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(20))
    options = dict(seq_length=256, cache_dir=tmp_path / "c")
    first = build_dataset([path], tokenizer, DatasetOptions(**options, seed=1))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    for name in ("cache.write_whole", "verified.write_whole", "row_plan._save"):
        monkeypatch.setattr(f"megatron_dft.data.{name}", refuse)
    again = build_dataset([path], tokenizer, DatasetOptions(**options, seed=2))
    assert len(again.conversations) == len(first.conversations) and len(again) == len(first)


def test_processes_that_come_together_tokenise_once(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(50))
    builds, blocks = [], prepare._blocks

    def slow(*args):
        builds.append(1)
        time.sleep(0.3)  # the others arrive meanwhile
        yield from blocks(*args)

    monkeypatch.setattr(prepare, "_blocks", slow)
    stores: list = []
    threads = [
        threading.Thread(target=lambda: stores.extend(prepared([path], tokenizer, tmp_path / "c")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(stores) == 4 and all(same_store(s, stores[0]) for s in stores)


def test_a_cache_that_cannot_be_written_is_a_users_mistake(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", some_rows(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--data-cache: .* choose another directory"):
        prepared([path], tokenizer, tmp_path / "file")


def test_the_workers_import_neither_torch_nor_transformers():
    program = (
        "import sys, megatron_dft.data.workers as w\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'megatron') "
        "if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_a_worker_that_dies_is_reported(tmp_path, tokenizer, monkeypatch):
    serve = "import sys, pickle, os; pickle.load(sys.stdin.buffer); os.kill(os.getpid(), 9)"
    popen = subprocess.Popen
    monkeypatch.setattr(
        workers.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-c", serve], **options),
    )
    batches = list(prepare.read_batches(parse_sources([_file(tmp_path)])[0]))
    with pytest.raises(RuntimeError, match="signal 9 .* lower --data-workers"):
        list(workers.tokenize_in_parallel(batches, encoder_spec(tokenizer), None, 2))


def test_progress_lines_tell_how_far_it_is(capsys, monkeypatch):
    from megatron_dft.data import progress

    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    with progress.progress_bar("tokenising a.jsonl", 200, True) as advance:
        advance(50, 10)
        advance(150, 30)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit(" in ", 1)[0] for line in lines] == [
        "tokenising a.jsonl: 25%, 10 rows",
        "tokenising a.jsonl: 100%, 40 rows",
        "tokenising a.jsonl: done, 40 rows",
    ]


def test_the_meta_is_plain_json(tmp_path, tokenizer):
    prepared([_file(tmp_path)], tokenizer, tmp_path / "c")
    meta = json.loads(next((tmp_path / "c" / "tokens").glob("*/meta.json")).read_text())
    assert meta["counts"]["rows"] == 20 and meta["paths"] and meta["bad"] == []
