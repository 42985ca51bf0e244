"""A job's flags and process groups at full size on one machine: `megatron-dft plan --simulate`.

    WORLD_SIZE=1024 python -m megatron_dft.simulate CONFIG --tensor-model-parallel-size 8 …

This process plays one rank ($RANK). Its flags go through a real run's checks, and Megatron's
own, and Megatron builds the process groups on torch's fake backend. No weights are read and
no model is built.
"""

import contextlib
import io
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def _config_only(directory: Path) -> Any:
    from megatron_dft.hf.source import HFCheckpoint

    file = directory / "config.json" if directory.is_dir() else directory
    config = json.loads(file.read_text(encoding="utf-8"))
    return HFCheckpoint(file.parent, str(file.parent), None, config, {})


def main() -> int:
    """Status 0 where all of it is accepted, 2 with the reason where not."""
    source, *flags = sys.argv[1:]
    # What a layout does not depend on: the checks of a run want it all the same.
    rest = "--hf-model X --train-data X --no-packing --train-iters 1 --lr 1e-5".split()
    sys.argv = ["simulate", *rest, *flags, "--fake-process-group", "--distributed-backend", "gloo"]
    began = time.monotonic()
    from megatron_dft import arguments, data_provider, train
    from megatron_dft.cluster.model_shape import read_config

    config = Path(source)
    if not config.exists():
        read_config(source)  # fetches config.json into the hub's cache
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(source, "config.json"))
    arguments.open_checkpoint = lambda *a, **k: _config_only(config)  # type: ignore[assignment]
    data_provider.prepare = lambda args: None
    said = io.StringIO()  # Megatron lists every argument
    try:
        with contextlib.redirect_stdout(said):
            train._configure(sys.argv[1:], scoring=False)
            configured = time.monotonic()
            from megatron.training.initialize import initialize_megatron

            initialize_megatron()
    except (ValueError, AssertionError) as error:
        print(f"simulate: refused: {train._one_line(error)}", file=sys.stderr)
        return train.CONFIGURATION_ERROR
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
