"""One micro-batch: the batch, the two routes of the loss, and the gradient's self-test."""
