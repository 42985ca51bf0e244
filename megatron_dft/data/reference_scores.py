"""Log-probabilities of a reference model, kept beside the data: written once, read by training.

Layout of a directory (little-endian):

    scores.f32     log p of the tokens 1 … n − 1 of each conversation, one conversation behind the
                   other; 0 where the token is not supervised
    scores.json    which data, which model; written last, so scores without it are not whole
    segments/      while scoring: plan.json and the finished parts, NNNNNN.f32

A conversation is found by its number among the usable ones of its data set. So the scores do not
depend on seed, epoch, packing, layout, or the weights of the sources; --seq-length and --overlong
matter as far as they change which conversations are used or where they are cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dft.data.cache import content_hash
from megatron_dft.data.fingerprint import differences, has_sources
from megatron_dft.data.overlong import Conversations
from megatron_dft.data.packing import windows
from megatron_dft.storage.files import read_json_object, whole_file, write_whole

FLAG = "--dft-reference-scores"
VERSION = 1
_HEADER, _SCORES, _SEGMENTS = "scores.json", "scores.f32", "segments"


def data_identity(conversations: Conversations, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the scores of a data set depend on; `identity`: that of its ChatDataset."""
    return {
        "sources": identity["sources"],
        "cut": conversations.digest(),
        "seq_length": identity["seq_length"],
        "overlong": identity["overlong"],
        "valid_share": identity.get("valid_share", 0),
    }


def _changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Phrases for what differs in two data identities; nothing where the tokens are the same."""
    found = differences({"sources": saved["sources"]}, {"sources": current["sources"]})
    if not found and saved["cut"] != current["cut"]:
        was, now = (
            f"--seq-length {d['seq_length']} with --overlong {d['overlong']}"
            f" and --valid-share {d.get('valid_share', 0):g}"
            for d in (saved, current)
        )
        found.append(f"other conversations are left out or cut: was {was}, is {now}")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json_object(path)
        if found.get("version") != VERSION:
            raise ValueError(f"version {str(found.get('version'))[:40]}")
        data, model = found.get("data"), found.get("model")
        # A plan has no tokens and no hash yet.
        tokens, sha256 = (found.get(k, d) for k, d in (("tokens", 1), ("sha256", "")))
        if path.name == _HEADER and not {"tokens", "sha256"} <= found.keys():
            raise ValueError("its number of tokens or its hash is missing")
        if not isinstance(data, dict) or not has_sources(data):
            raise ValueError("it does not say of which data")
        if not {"cut", "seq_length", "overlong"} <= data.keys():
            raise ValueError("it does not say of which data")
        if not isinstance(model, dict) or not {"name", "dtype"} <= model.keys():
            raise ValueError("it does not say of which model")
        if type(tokens) is not int or tokens < 1 or not isinstance(sha256, str):
            raise ValueError("its number of tokens or its hash is none")
        return found
    except ValueError as error:
        raise ValueError(
            f"{FLAG}: {str(path)!r} is not readable ({error}); delete the directory and score again"
        ) from None


def _offsets(conversations: Conversations) -> np.ndarray:
    """int64 [N + 1]: where each conversation's scores begin; the first token has none."""
    return np.concatenate([[0], np.cumsum(conversations.lengths() - 1)]).astype(np.int64)


def _covers(borders: Any, conversations: int) -> bool:
    """Whether [begin, end) pairs follow each other over all conversations."""
    if not isinstance(borders, list) or not all(
        isinstance(b, list) and len(b) == 2 for b in borders
    ):
        return False
    ends = [0, *(n for border in borders for n in border), conversations]
    whole = all(type(n) is int for n in ends)
    return whole and ends[::2] == ends[1::2] and all(b <= e for b, e in borders)


class ReferenceScores:
    """Finished scores. `header`: what scores.json holds (`data`, `model`, `sha256`, …)."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises ValueError where the directory holds none, unfinished or damaged ones."""
        self.directory = Path(directory)
        header = self.directory / _HEADER
        if not header.exists():
            unfinished = (self.directory / _SEGMENTS).is_dir()
            raise ValueError(
                f"{FLAG}: {str(directory)!r} holds {'unfinished' if unfinished else 'no'} scores; "
                f"{'finish' if unfinished else 'make'} them with the same flags: torchrun … -m "
                "megatron_dft.score"
            )
        self.header = _read(header)
        path, expected = self.directory / _SCORES, 4 * self.header["tokens"]
        actual = path.stat().st_size if path.exists() else -1
        if actual != expected:
            raise ValueError(
                f"{FLAG}: {str(path)!r} has {actual} bytes, expected {expected}; delete the "
                "directory and score again"
            )
        self._scores = np.memmap(path, dtype="<f4", mode="r")
        self._starts = np.empty(0, dtype=np.int64)

    def check_content(self, cache: Path | None) -> None:
        """Raise ValueError unless the scores are those that were written.

        Reads all of them, once: `cache` (that of the tokens) remembers the file's hash.
        """
        path = self.directory / _SCORES
        found, expected = content_hash(path, cache), self.header.get("sha256")
        if found != expected:
            raise ValueError(
                f"{FLAG}: {str(path)!r} is not what was scored: its SHA-256 is {found}, "
                f"{_HEADER} says {expected}; delete the directory and score again"
            )

    def attach(self, conversations: Conversations, identity: Mapping[str, Any]) -> ReferenceScores:
        """These scores for that data set; ValueError where they were made from another one."""
        changes = _changes(self.header["data"], data_identity(conversations, identity))
        if changes:
            raise ValueError(
                f"{FLAG}: the scores in {str(self.directory)!r} are of other data: "
                f"{'; '.join(changes)}; restore these settings, or score into a new directory"
            )
        self._starts = _offsets(conversations)
        return self

    def __getitem__(self, number: int) -> np.ndarray:
        """float32 [n − 1]: log p of the tokens 1 … n − 1 of a conversation of the data set."""
        return self._scores[self._starts[number] : self._starts[number + 1]]


class ScoreWriter:
    """Writes scores in segments of consecutive conversations; a killed job goes on with the rest.

    Used by one process of a job. `borders`: [begin, end) conversations of each segment, those of
    the first start; `done`: the segments that are stored already; `complete`: nothing is to do.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        conversations: Conversations,
        identity: Mapping[str, Any],
        model: Mapping[str, Any],
        segment_tokens: int,
    ) -> None:
        """identity: of the ChatDataset; model: what was scored, equal for equal scores but for its
        `name`. segment_tokens: of a segment, about. Raises ValueError where the directory holds
        scores of other data or of another model. Writes nothing yet."""
        self._directory, self._conversations = Path(directory), conversations
        self._starts = _offsets(conversations)
        self._plan: dict[str, Any] = {
            "version": VERSION,
            "data": data_identity(conversations, identity),
            "model": dict(model),
            "borders": windows(conversations.lengths() - 1, segment_tokens),
        }
        self.complete = (self._directory / _HEADER).exists()
        saved = self._directory / (_HEADER if self.complete else f"{_SEGMENTS}/plan.json")
        if saved.exists():
            self._go_on(_read(saved))
        self.borders: list[tuple[int, int]] = [tuple(b) for b in self._plan["borders"]]
        self.done = [i for i in range(len(self.borders)) if self.complete or self._is_stored(i)]

    def _go_on(self, saved: dict[str, Any]) -> None:
        changes = _changes(saved["data"], self._plan["data"])
        was, now = saved["model"], self._plan["model"]
        for key in sorted((was.keys() | now.keys()) - {"name"}):
            if was.get(key) != now.get(key):
                changes.append(
                    f"the model's {key} was {was.get(key)} ({was['name']}), is {now.get(key)} "
                    f"({now['name']})"
                )
        if changes:
            raise ValueError(
                f"{FLAG}: {str(self._directory)!r} holds scores of something else: "
                f"{'; '.join(changes)}; choose another directory, or delete this one"
            )
        if not _covers(saved.get("borders"), len(self._starts) - 1):
            raise ValueError(
                f"{FLAG}: the segments of {str(self._directory)!r} do not follow each other; "
                "delete the directory and score again"
            )
        self._plan["borders"] = saved["borders"]

    def start(self) -> None:
        """Writes the plan that later starts go on with."""
        text = json.dumps(self._plan)
        write_whole(self._directory / _SEGMENTS / "plan.json", text)

    def _path(self, segment: int) -> Path:
        return self._directory / _SEGMENTS / f"{segment:06d}.f32"

    def _tokens(self, segment: int) -> int:
        begin, end = self.borders[segment]
        return int(self._starts[end] - self._starts[begin])

    def _is_stored(self, segment: int) -> bool:
        path = self._path(segment)
        return path.exists() and path.stat().st_size == 4 * self._tokens(segment)

    def write(self, segment: int, scores: Mapping[int, np.ndarray]) -> None:
        """Stores a segment: conversation → float32 [n − 1]; the file is whole or absent.

        Raises RuntimeError naming the row of a conversation with a score that is not a number.
        """
        begin, end = self.borders[segment]
        for number in range(begin, end):
            if not np.isfinite(scores[number]).all():
                raise RuntimeError(
                    f"{self._conversations.where(number)}: the model gives log p = NaN or inf for "
                    "a token of this conversation; nothing of its segment was stored"
                )
        values = np.concatenate([scores[n] for n in range(begin, end)]).astype("<f4", copy=False)
        assert len(values) == self._tokens(segment)
        write_whole(self._path(segment), values.tobytes())

    def finish(self) -> ReferenceScores:
        """Joins the segments; only then the directory holds scores that can be opened."""
        sha256 = hashlib.sha256()
        with whole_file(self._directory / _SCORES) as file:
            for segment in range(len(self.borders)):
                content = self._path(segment).read_bytes()
                sha256.update(content)
                file.write(content)
        header = {**self._plan, "tokens": int(self._starts[-1]), "sha256": sha256.hexdigest()}
        write_whole(self._directory / _HEADER, json.dumps(header, indent=1))
        shutil.rmtree(self._directory / _SEGMENTS, ignore_errors=True)
        return ReferenceScores(self._directory)
