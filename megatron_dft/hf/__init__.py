"""Hugging Face checkpoints in and out of sharded Megatron models."""
