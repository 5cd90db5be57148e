"""Weights that are cut over the ranks of a run: each rank holds a part of every layer and gathers a layer for its turn.

What PyTorch's FSDP2 does, with the same collectives and the layout of its DTensors, but not by `fully_shard`: that
hooks the forward and backward of modules, and a layer-major step has none; it asks for a layer once a direction, for
all micro-batches. Here that question is the hook.
"""
