"""Megatron's imports and models print what a user of the converters can do nothing about."""

import logging
import warnings


def quiet() -> None:
    """Silence Python warnings (missing Apex, deprecated PyTorch calls) and Megatron's notices."""
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
