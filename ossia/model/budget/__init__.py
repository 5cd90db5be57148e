"""How many bytes a step takes, part by part, from a model's shape alone: what `auto` and `ossia plan` decide by.

No torch here. The formulas follow the code that they are about: `transformer.layer_forward`, `ops.fused`, `ops.moe`,
`ops.attention`, `ops.loss`, `train.schedule`, `train.optim`; `tests/model/test_budget.py` holds them against the bytes
that are alive while that code runs.
"""
