"""A run's flags: one file a subject; a flag is defined and refused in the same file."""
