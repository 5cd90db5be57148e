"""Code for the machine itself: C for the CPU, compiled on first use."""
