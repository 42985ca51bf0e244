"""One file a sub-command of `megatron-dft`; cli.py lists them. Nothing imports this package."""
