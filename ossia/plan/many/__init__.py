"""A plan for many GPUs: bytes of a rank, bytes that travel, and how long a step takes. Estimates, from closed forms."""
