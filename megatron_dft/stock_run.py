"""--loss in an unedited Megatron-LM script: run it with our three lines in memory alone.

    python -m megatron_dft.stock_run pretrain_gpt.py --loss dft <Megatron's flags>
    torchrun --nproc-per-node 8 -m megatron_dft.stock_run pretrain_gpt.py --loss dft ...

The script's file is not changed; what `megatron-dft patch` would add is added to its syntax tree,
so a traceback names the file's own lines. What `patch` refuses is refused here too.
"""

import sys
import types
from pathlib import Path

from megatron_dft.compat import stock_script
from megatron_dft.compat.stock_places import PlaceError

_USAGE = "usage: python -m megatron_dft.stock_run pretrain_gpt.py --loss NAME <Megatron's flags>"


def main(words: list[str]) -> int:
    """Run the script as `__main__`; 2 and one line on standard error where it cannot be."""
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    script = Path(words[0])
    try:
        code = stock_script.compiled(script.read_bytes(), str(script))
    except OSError as error:
        print(f"stock_run: expected a script, got {script}: {error.strerror}", file=sys.stderr)
        return 2
    except PlaceError as error:
        print(
            f"stock_run: {script}: {error}; see what `megatron-dft patch` says of it, or use "
            "megatron_dft.train",
            file=sys.stderr,
        )
        return 2
    sys.argv = words
    sys.path[0] = str(script.resolve().parent)  # as `python script` has it
    module = types.ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module  # what the script pickles is found again in a worker
    exec(code, module.__dict__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
