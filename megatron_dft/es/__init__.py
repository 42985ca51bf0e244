"""Evolution strategies: a model perturbed by seeds, rewarded, and moved; forward passes alone.

arXiv 2509.24372, written from the paper. Megatron is imported by `sharded` alone.
"""
