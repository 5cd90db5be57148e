"""Passes of training in C for a CPU, compiled on first use. Each has its torch reference in `ossia/ops`."""
