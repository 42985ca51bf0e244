"""Stopping, committing, resuming, NaN, hangs, and the word that a run leaves at its end."""
