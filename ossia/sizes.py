"""Sizes that the computation walks in, where a plan of its memory, which imports no torch, needs them too."""

from __future__ import annotations

import os
import sys

VOCAB_BLOCK, ROW_BLOCK = 4096, 1024  # tokens of the vocabulary, and rows, that a CPU's loss takes at once
GPU_ROW_BLOCK, GPU_VOCAB_BLOCK = 4096, 8192  # enough for a GPU to be busy, and 64 MB of logits
ATTENTION_KEPT_FROM = 8192  # tokens of a document whose attention is worth keeping where layers are computed again
DENSE_BLOCK = 128  # queries of a block, where every document is shorter than that
FULL_BLOCK = 64  # slots of a block of a cache of keys and values
RANK_BYTES = 16  # that the rows of an expert's adapter come in: the grouped product takes no others


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
