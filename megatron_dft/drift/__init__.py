"""The weight-update lens: what fine-tuning did to the weights."""
