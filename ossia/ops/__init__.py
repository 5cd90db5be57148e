"""Pure functions on tensors: a plain PyTorch reference first, faster paths beside it."""
