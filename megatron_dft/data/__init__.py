"""Rows to messages to token ids with an assistant mask to packs; no torch.distributed here."""
