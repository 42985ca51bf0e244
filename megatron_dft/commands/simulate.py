"""A job's flags and process groups at full size on one machine: `megatron-dft plan --simulate`.

    WORLD_SIZE=1024 python -m megatron_dft.commands.simulate CONFIG --tensor-model-parallel-size 8 …

This process plays one rank ($RANK). Its flags go through a real run's checks, and Megatron's
own, and Megatron builds the process groups on torch's fake backend. No weights are read and
no model is built.
"""

import contextlib
import io
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dft.cluster.model_shape import read_config
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.files import read_json_object
from megatron_dft.training.launch import REFUSED, configure, one_line


def _config_only(directory: Path) -> HFCheckpoint:
    """A checkpoint that has no tensors."""
    file = directory / "config.json" if directory.is_dir() else directory
    config = read_json_object(file)
    return HFCheckpoint(file.parent, str(file.parent), None, config, {})


def _local(source: str) -> Path:
    """config.json, or the directory that holds it; from the hub's cache for a hub name."""
    if Path(source).exists():
        return Path(source)
    read_config(source)  # fetches config.json into the hub's cache
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, "config.json"))


def main() -> int:
    """Status 0 where all of it is accepted, 2 with the reason where not."""
    source, *flags = sys.argv[1:]
    # What a layout does not depend on: the checks of a run want it all the same.
    rest = "--hf-model X --train-data X --no-packing --train-iters 1 --lr 1e-5".split()
    sys.argv = ["simulate", *rest, *flags, "--fake-process-group", "--distributed-backend", "gloo"]
    began = time.monotonic()
    config = _local(source)

    def opener(*_: Any, **__: Any) -> HFCheckpoint:
        return _config_only(config)

    said = io.StringIO()  # Megatron lists every argument
    try:
        with contextlib.redirect_stdout(said):
            configure(sys.argv[1:], lambda args: None, opener=opener)
            configured = time.monotonic()
            from megatron.training.initialize import initialize_megatron

            initialize_megatron()
    except (ValueError, AssertionError) as error:
        print(f"simulate: refused: {one_line(error)}", file=sys.stderr)
        return REFUSED
    from megatron.core import parallel_state as mpu

    sizes = {
        "TP": mpu.get_tensor_model_parallel_world_size(),
        "PP": mpu.get_pipeline_model_parallel_world_size(),
        "CP": mpu.get_context_parallel_world_size(),
        "EP": mpu.get_expert_model_parallel_world_size(),
        "DP": mpu.get_data_parallel_world_size(),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"simulated {os.environ['WORLD_SIZE']} ranks: flags accepted, process groups "
        f"{' '.join(f'{name} {size}' for name, size in sizes.items())} built in "
        f"{time.monotonic() - configured:.1f} s (start-up and checks {configured - began:.1f} s), "
        f"{peak:.0f} MiB at the peak",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
