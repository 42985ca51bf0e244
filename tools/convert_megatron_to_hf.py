"""torch_dist -> Hugging Face checkpoint: `megatron-dft export`, from a checkout.

`python tools/convert_megatron_to_hf.py CHECKPOINT OUT`; --help lists the options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that is not installed

from megatron_dft.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
