"""Model shapes that the tests share, all of them small."""

from __future__ import annotations

import dataclasses

from ossia.model.arch import SHAPES, Arch, alternating_layers

# No two sizes equal: what is mixed up shows.
UNEQUAL = Arch(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    num_experts=5,
    experts_per_token=3,
    sliding_window=8,
    vocab_size=265,
    layer_types=alternating_layers(2),
)
# And no value the default of transformers' GptOssConfig: what isn't read shows.
UNUSUAL = dataclasses.replace(
    UNEQUAL,
    num_layers=3,
    layer_types=alternating_layers(3),
    num_heads=6,
    head_dim=16,
    num_experts=8,
    sliding_window=20,
    vocab_size=201088,
    rms_eps=1e-4,
    rope_theta=9000.0,
    rope_factor=4.0,
    rope_beta_fast=24.0,
    rope_beta_slow=2.0,
    rope_original=64,
    rope_truncate=True,
    max_positions=1000,
)
# The least that has every part, for runs whose point isn't the model.
LEAST = dataclasses.replace(
    UNEQUAL,
    hidden_size=32,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=4,
    experts_per_token=2,
    sliding_window=16,
)
# The demo's in small, four layers deep; and half as deep with few experts.
SMALL = dataclasses.replace(
    SHAPES["demo"], hidden_size=64, intermediate_size=96, num_experts=8, head_dim=32, num_heads=4, num_kv_heads=2
)
SHALLOW = dataclasses.replace(
    SMALL, num_layers=2, layer_types=alternating_layers(2), num_experts=6, experts_per_token=2
)
