"""Planning, preflight and recovery for cluster runs."""
