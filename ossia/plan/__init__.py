"""What a recipe will take before a weight is read: memory by part, host and device, transfer, an expected speed.

No torch, unless the machine at hand is looked at (`machine.here`).
"""
