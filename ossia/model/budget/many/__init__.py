"""What a step takes on many GPUs: bytes of each rank, bytes that travel, and how much of that computing hides.

Closed forms and one small simulation, no torch: everything here is an estimate. The rules that it follows: layer-major,
so a layer is gathered once a direction and step; frozen weights travel packed; gradients are summed in float32.
"""
