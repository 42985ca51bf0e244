"""The CPU runtime and the CPU layer spec."""
