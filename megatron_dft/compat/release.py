"""Which Megatron releases this package drives, and what they get wrong before the loop begins."""

import argparse
import importlib.util
from importlib.metadata import version

from megatron_dft.compat.hooks import wrap


def check_release() -> str:
    """The installed megatron-core release; ValueError if it is not one that this package drives."""
    release = version("megatron-core")
    major, minor = (int(part) for part in release.split(".")[:2])
    if not (0, 19) <= (major, minor) < (0, 21):
        raise ValueError(
            f"megatron-core: expected >= 0.19, < 0.21, got {release}; "
            "pip install 'megatron-core[training]>=0.19,<0.21', or use patches/ for older releases"
        )
    return release


def mend_help(parser: argparse.ArgumentParser) -> None:
    """Let --help print: 0.19 has a bare % in the help of --moe-paged-stash-buffer-size-factor-cuda.

    argparse formats a help text with %, and fails on the whole page for one that cannot be.
    """
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if not action.help:
            continue
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def skip_built_helpers() -> None:
    """Let a run start where megatron-core is a wheel.

    Megatron runs `make` for its C++ index helpers at start, on every device, and the wheel, which
    brings them built, has no Makefile: a failure of make exits the job.
    """

    def make(original):
        def compile_helpers():
            if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
                original()

        return compile_helpers

    wrap("megatron.core.datasets.utils:compile_helpers", make)
