"""The step over many micro-batches, the optimizer, the loop around it, and the run folder that it leaves behind."""
