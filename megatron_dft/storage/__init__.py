"""Reads at an offset, torch_dist's shards, safetensors' dtypes: what several packages need."""
