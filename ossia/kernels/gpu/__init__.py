"""Triton kernels for a GPU. Each has its torch reference in `ossia/ops`, which says what it computes.

Modules here are imported when a kernel is first wanted, since Triton takes a while to import. On a CPU they run in
Triton's interpreter, for tests: TRITON_INTERPRET=1 in the environment before Triton is imported.
"""
