"""The DFT loss family; imports torch alone, so that it serves any training loop.

registry          objectives by name, their parameters and flags
objectives        the mathematics of each: token statistics → weight on −log p
vocab_parallel    loss and statistics from vocabulary-sharded logits
linear_head       loss from hidden states, without the logits
token_stats       what an objective may know of a token; conversations and batches
"""
