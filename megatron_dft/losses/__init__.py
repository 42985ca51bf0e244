"""The DFT loss family; imports torch alone."""
