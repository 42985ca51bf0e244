"""`megatron-dft patch`: put --loss into the pretrain_gpt.py of a stock Megatron-LM checkout.

A diff of patches/ holds our added lines alone, without context. What makes that safe is its `index`
line: git's SHA-1 of the whole file before and after. So a file is changed only if it is, byte for
byte, one that the diff was checked against, and it is taken back only from what the diff produced.
"""

import argparse
import contextlib
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dft.storage.files import write_whole

SUMMARY = "put --loss into the pretrain_gpt.py of a stock Megatron-LM checkout, or take it out"

SCRIPT = "pretrain_gpt.py"
PACKAGE_INFO = Path("megatron", "core", "package_info.py")
# Beside the package in a source tree; where setup.py's data_files puts them in an installation.
DIRECTORIES = (
    Path(__file__).resolve().parents[2] / "patches",
    Path(sysconfig.get_path("data"), "share", "megatron_dft", "patches"),
)


@dataclass(frozen=True)
class Patch:
    """One diff: `additions` are (number of the new file's line, the line with its newline)."""

    path: Path
    release: str
    core: str
    before: str
    after: str
    additions: tuple[tuple[int, bytes], ...]

    def apply(self, original: bytes) -> bytes:
        """The file with our lines in it."""
        lines = original.splitlines(keepends=True)
        for number, text in self.additions:  # ascending, so numbers of the new file are right
            lines.insert(number - 1, text)
        return self._checked(b"".join(lines), self.after)

    def revert(self, patched: bytes) -> bytes:
        """The file without our lines, byte for byte as it was."""
        lines = patched.splitlines(keepends=True)
        for number, text in reversed(self.additions):
            assert lines[number - 1] == text, f"{self.path}: line {number} is not ours"
            del lines[number - 1]
        return self._checked(b"".join(lines), self.before)

    def _checked(self, content: bytes, expected: str) -> bytes:
        if blob_hash(content) != expected:
            raise ValueError(
                f"{self.path}: expected to lead to a {SCRIPT} of hash {expected[:10]}, got "
                f"{blob_hash(content)[:10]}; the diff was changed, restore it"
            )
        return content


def blob_hash(content: bytes) -> str:
    """What `git hash-object` prints for a file of this content."""
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def read_patch(path: Path) -> Patch:
    """Read one of our diffs: a head with Release and Megatron-Core, then added lines alone."""
    head, _, body = path.read_bytes().partition(b"\ndiff --git ")
    words = dict(re.findall(r"^([\w-]+): (\S+)", head.decode(), re.MULTILINE))
    index = re.search(rb"^index ([0-9a-f]{40})\.\.([0-9a-f]{40})", body, re.MULTILINE)
    additions: list[tuple[int, bytes]] = []
    number = 0
    hunks = body[body.find(b"\n@@") + 1 :].splitlines(keepends=True)
    for line in hunks:
        if start := re.match(rb"@@ -\d+,0 \+(\d+)(?:,\d+)? @@", line):
            number = int(start[1])
        elif line.startswith(b"+") and number:
            additions.append((number, line[1:]))
            number += 1
        else:
            additions.clear()
            break
    if index is None or not additions or not {"Release", "Megatron-Core"} <= words.keys():
        raise ValueError(f"{path}: expected a diff of added lines alone, got another; restore it")
    before, after = index[1].decode(), index[2].decode()
    return Patch(path, words["Release"], words["Megatron-Core"], before, after, tuple(additions))


def read_patches() -> list[Patch]:
    """All diffs that came with this package."""
    for directory in DIRECTORIES:
        if found := sorted(directory.glob("*.diff")):
            return [read_patch(path) for path in found]
    places = " or ".join(str(directory) for directory in DIRECTORIES)
    raise ValueError(
        f"patches: expected diffs in {places}, got none; run the command from a source tree of "
        "megatron_dft"
    )


def core_release(checkout: Path) -> str:
    """MAJOR.MINOR of the checkout's megatron.core; nothing of it is imported."""
    path = checkout / PACKAGE_INFO
    if not path.is_file() or not (checkout / SCRIPT).is_file():
        raise ValueError(
            f"--megatron-lm: expected a Megatron-LM checkout with {PACKAGE_INFO} and {SCRIPT}, "
            f"got {checkout}; git clone --branch core_v0.18.2 the Megatron-LM repository"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    numbers = [re.search(rf"^{part} = (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR")]
    return ".".join(found[1] if found else "?" for found in numbers)


def find_patch(checkout: Path, content: bytes, patches: list[Patch]) -> tuple[Patch, bool]:
    """The diff that this checkout's script belongs to, and whether it is applied already.

    Raises ValueError for a release without a diff and for a script that none was checked against.
    """
    core = core_release(checkout)
    mine = [patch for patch in patches if patch.core == core]
    if not mine:
        known = ", ".join(f"{patch.core} ({patch.release})" for patch in patches)
        raise ValueError(
            f"--megatron-lm: expected megatron-core {known}, got {core} in {checkout}; "
            "check out one of these releases"
        )
    digest = blob_hash(content)
    for patch in mine:
        if digest in (patch.before, patch.after):
            return patch, digest == patch.after
    expected = " or ".join(f"{patch.before[:10]} ({patch.release})" for patch in mine)
    state = "has a changed patch in it" if b"megatron_dft" in content else "was modified"
    raise ValueError(
        f"--megatron-lm: expected {checkout / SCRIPT} of git hash {expected}, got {digest[:10]}, "
        f"so it {state} or is of another commit; git checkout -- {SCRIPT}, or add the three lines "
        f"of {mine[0].path} by hand"
    )


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--megatron-lm: expected to read and write {path}, got {error.strerror}; "
            "check its permissions"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megatron-dft patch`."""
    parser.add_argument(
        "--megatron-lm", metavar="DIR", required=True, type=Path, help="a Megatron-LM checkout"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--check", action="store_true", help="say whether it would apply or is applied; no change"
    )
    mode.add_argument(
        "--revert", action="store_true", help="take the lines out: the file as git has it"
    )


def run(args: argparse.Namespace) -> int:
    """Apply, check or revert; exit status 0, ValueError for a checkout that is not known."""
    script = args.megatron_lm / SCRIPT
    patches = read_patches()
    core_release(args.megatron_lm)  # names a directory that is no checkout before it is read
    with _one_line_errors(script):
        content = script.read_bytes()
        patch, applied = find_patch(args.megatron_lm, content, patches)
        name = f"{patch.path.name} ({patch.release}, megatron-core {patch.core})"
        if args.check:
            patch.revert(content) if applied else patch.apply(content)
            print(f"{script}: {name} {'is applied' if applied else 'would apply'}")
        elif args.revert:
            if applied:
                write_whole(script.resolve(), patch.revert(content))
            print(f"{script}: {name} {'taken out' if applied else 'is not applied'}")
        else:
            if not applied:
                write_whole(script.resolve(), patch.apply(content))
            print(f"{script}: {name} {'was applied before' if applied else 'applied'}")
            print(f"torchrun ... {script} --loss dft; the objectives: patches/README.md")
    return 0
