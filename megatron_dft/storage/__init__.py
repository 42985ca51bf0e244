"""Files on disk: whole writes, hashes, safetensors, torch_dist."""
