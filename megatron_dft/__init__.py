"""Dynamic Fine-Tuning (DFT) and its family for Megatron."""

__version__ = "0.1.0"
