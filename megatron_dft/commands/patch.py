"""`megatron-dft patch`: put --loss into the pretrain_gpt.py of a Megatron-LM checkout or fork.

The three lines go where the script's syntax tree has their places (compat/stock_script.py). Scripts
of the releases are known by git's hash of the whole file: for those a diff of patches/ says before
and after, and what the tree leads to is held against it.
"""

import argparse
import contextlib
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dft.compat import stock_script
from megatron_dft.compat.stock_places import PlaceError, find
from megatron_dft.storage.files import write_whole

SUMMARY = "put --loss into the pretrain_gpt.py of a Megatron-LM checkout, or take it out"

SCRIPT = "pretrain_gpt.py"
PACKAGE_INFO = Path("megatron", "core", "package_info.py")
# Beside the package in a source tree; where setup.py's data_files puts them in an installation.
DIRECTORIES = (
    Path(__file__).resolve().parents[2] / "patches",
    Path(sysconfig.get_path("data"), "share", "megatron_dft", "patches"),
)


@dataclass(frozen=True)
class Known:
    """A script that was checked: git's hashes of it before and after, and the release it is of."""

    path: Path
    release: str
    before: str
    after: str


def blob_hash(content: bytes) -> str:
    """What `git hash-object` prints for a file of this content."""
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def read_known(path: Path) -> Known:
    """The head and the index line of one of our diffs."""
    text = path.read_text(encoding="utf-8", errors="replace")
    release = re.search(r"^Release: (\S+)", text, re.MULTILINE)
    index = re.search(r"^index ([0-9a-f]{40})\.\.([0-9a-f]{40})", text, re.MULTILINE)
    if release is None or index is None:
        raise ValueError(f"{path}: expected a diff with Release and index, got another; restore it")
    return Known(path, release[1], index[1], index[2])


def read_all_known() -> list[Known]:
    """The scripts whose diffs came with this package; none where patches/ did not come along."""
    for directory in DIRECTORIES:
        if found := sorted(directory.glob("*.diff")):
            return [read_known(path) for path in found]
    return []


def check_checkout(checkout: Path) -> None:
    """ValueError where the directory is no Megatron-LM checkout; nothing of it is imported."""
    if not (checkout / PACKAGE_INFO).is_file() or not (checkout / SCRIPT).is_file():
        raise ValueError(
            f"--megatron-lm: expected a Megatron-LM checkout with {PACKAGE_INFO} and {SCRIPT}, "
            f"got {checkout}; git clone --branch core_v0.19.0 the Megatron-LM repository"
        )


def core_release(checkout: Path) -> str:
    """MAJOR.MINOR of the checkout's megatron.core, for messages."""
    text = (checkout / PACKAGE_INFO).read_text(encoding="utf-8", errors="replace")
    numbers = [re.search(rf"^{part} = (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR")]
    return ".".join(found[1] if found else "?" for found in numbers)


def by_hand(core: str) -> str:
    """What to add to a script whose places are not found, in one line."""
    entry = "pretrain" if core in ("0.16", "0.17") else "parse_and_validate_args"
    return (
        f"add by hand, where your script does the same: `{stock_script.IMPORT}`; "
        f"`{stock_script.DECORATOR}` on the function that returns (loss, tokens, report) from the "
        f"cross entropy of each token; `{stock_script.wrapped_entry(entry)}` before its call"
    )


def patched(content: bytes, known: list[Known]) -> tuple[bytes, Known | None]:
    """The script with our lines, and the release that it is of, if it is one's.

    Raises PlaceError, or ValueError where a known script does not become what was checked.
    """
    release = next((one for one in known if one.before == blob_hash(content)), None)
    after = stock_script.apply(content)
    if stock_script.revert(after) != content:
        raise PlaceError("lines that can be taken out again", "another script")
    if release is not None and blob_hash(after) != release.after:
        raise ValueError(
            f"{release.path}: expected to lead to a {SCRIPT} of hash {release.after[:10]}, got "
            f"{blob_hash(after)[:10]}; the diff was changed, restore it"
        )
    return after, release


@contextlib.contextmanager
def _one_line_errors(path: Path, core: str) -> Iterator[None]:
    try:
        yield
    except PlaceError as error:
        raise ValueError(
            f"--megatron-lm: {path}: expected {error.expected}, got {error.got}; {by_hand(core)}"
        ) from None
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
        "--revert", action="store_true", help="take the lines out: the very bytes of before"
    )


def run(args: argparse.Namespace) -> int:
    """Apply, check or revert; exit status 0, ValueError for a script whose places are others."""
    script, known = args.megatron_lm / SCRIPT, read_all_known()
    check_checkout(args.megatron_lm)
    core = core_release(args.megatron_lm)
    with _one_line_errors(script, core):
        content = script.read_bytes()
        if stock_script.added_lines(content):
            return _applied(args, script, content, core, known)
        if args.revert:
            print(f"{script}: --loss is not applied")
            return 0
        after, release = patched(content, known)
        source = f"as checked for {release.release}" if release else "places found by its syntax"
        name = f"--loss ({source}, megatron-core {core})"
        if args.check:
            print(f"{script}: {name} would apply")
            return 0
        write_whole(script.resolve(), after)
        print(f"{script}: {name} applied")
        _next_step(script)
    return 0


def _applied(
    args: argparse.Namespace, script: Path, content: bytes, core: str, known: list[Known]
) -> int:
    """What `run` does with a script that has our lines."""
    before = stock_script.revert(content)
    if args.revert:
        write_whole(script.resolve(), before)
        print(f"{script}: --loss taken out (git hash {blob_hash(before)[:10]})")
        return 0
    find(before)  # lines that stand, but no longer on what they wrap, are no patch
    release = next((one for one in known if one.after == blob_hash(content)), None)
    name = f"--loss ({release.release if release else 'a script of its own'}, megatron-core {core})"
    print(
        f"{script}: {name} {'is' if args.check else 'was'} applied{'' if args.check else ' before'}"
    )
    if not args.check:
        _next_step(script)
    return 0


def _next_step(script: Path) -> None:
    print(f"torchrun ... {script} --loss dft; the objectives: patches/README.md")
