"""Hugging Face checkpoint -> torch_dist: `megatron-dft import`, from a checkout.

`python tools/convert_hf_to_megatron.py HF_MODEL OUT`; --help lists the options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a checkout that is not installed

from megatron_dft.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
