"""Checkpoints of tensors that are cut over ranks: each rank writes its own part, and any number of them reads it."""
