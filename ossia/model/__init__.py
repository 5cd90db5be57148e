"""gpt-oss itself: its shape, its weights on disk, the transformer, adapters, and what fits in memory."""
