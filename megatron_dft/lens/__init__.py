"""The weight-update lens inside a run: distance from the base, the L2-SP anchor, held targets."""
