"""Compare the logits of a torch_dist checkpoint in Megatron with a Hugging Face one in
transformers.

`python -m megatron_dft.commands.compare_logits HF_DIRECTORY TORCH_DIST` prints the largest
difference in fp32 on a prompt and exits 1 when it is above the tolerance. `megatron-dft
import|export --verify` call it.
"""

import argparse
import sys

import torch

from megatron_dft.cpu import runtime
from megatron_dft.drift.scoring import load_model
from megatron_dft.hf.config import own_layers
from megatron_dft.hf.source import open_checkpoint

TOLERANCE = 1e-3  # of the largest logit; rounding in fp32 is a hundred times smaller
PROMPT = "If a train travels 120 km in 1.5 hours, how fast is it?"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dft.commands.compare_logits", description=__doc__
    )
    parser.add_argument("hf_directory")
    parser.add_argument("torch_dist")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        runtime.activate()
    elif own_layers(open_checkpoint(args.hf_directory)) is not None:
        print(
            "--verify: this architecture is compared on the CPU layers; set CUDA_VISIBLE_DEVICES="
        )
        return 1
    ids = _prompt(args.hf_directory)
    ours = _megatron_logits(args.hf_directory, args.torch_dist, ids)
    theirs = _transformers_logits(args.hf_directory, ids)
    difference = (ours - theirs).abs().max().item()
    scale = theirs.abs().max().item()
    print(f"verified: logits differ by at most {difference:.1e} (largest logit {scale:.3g})")
    return int(not difference <= TOLERANCE * scale)


def _prompt(hf_directory: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf_directory)(PROMPT, return_tensors="pt").input_ids


def _megatron_logits(hf_directory: str, torch_dist: str, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits [1, s, vocabulary] of the torch_dist checkpoint."""
    from megatron.core import dist_checkpointing, tensor_parallel

    from megatron_dft.hf import skeleton
    from megatron_dft.hf.convert_export import find_iteration

    source = str(find_iteration(torch_dist))
    with skeleton.single_process():
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        model = skeleton.build(open_checkpoint(hf_directory), device="cpu").float().eval()
        content = (
            dist_checkpointing.load_common_state_dict(source).get("content_metadata")
            or skeleton.CONTENT
        )
        state = {"model": model.sharded_state_dict(metadata=skeleton.with_groups(content))}
        model.load_state_dict(dist_checkpointing.load(state, source)["model"])
        positions = torch.arange(ids.shape[1])[None]
        hidden = torch.ones(1, 1, ids.shape[1], ids.shape[1]).tril() < 0.5
        with torch.no_grad():
            return model.cuda()(ids.cuda(), positions.cuda(), hidden.cuda()).cpu().float()


def _transformers_logits(hf_directory: str, ids: torch.Tensor) -> torch.Tensor:
    model = load_model(hf_directory)
    with torch.no_grad():
        return model(ids).logits


if __name__ == "__main__":
    sys.exit(main())
