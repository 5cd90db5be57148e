"""YaRN tables against transformers, with the correction range rounded and not."""

from __future__ import annotations

import pytest
import torch

from ossia.ops.rope import Yarn, apply_rope, rope_tables, yarn_frequencies

RELEASED = Yarn(64, 150000.0, 32.0, 32.0, 1.0, 4096, truncate=False)


@pytest.mark.parametrize("truncate", [False, True])
def test_frequencies_and_scale_equal_transformers(truncate: bool) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": truncate,
    }
    config = GptOssConfig(head_dim=64, rope_parameters=parameters, max_position_embeddings=131072)
    theirs = GptOssRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 127, 4095, 4096, 131071])
    yarn = Yarn(64, 150000.0, 32.0, 32.0, 1.0, 4096, truncate)
    frequencies, scale = yarn_frequencies(yarn)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling)
    cos, sin = theirs(torch.zeros(1, 1, 1, dtype=torch.float32), positions[None])
    for mine, true in zip(rope_tables(yarn, positions, torch.float32), (cos[0], sin[0]), strict=True):
        torch.testing.assert_close(mine, true[:, :32], rtol=1e-4, atol=2e-3)


def test_rounding_the_correction_range_changes_the_frequencies() -> None:
    rounded = Yarn(64, 150000.0, 32.0, 32.0, 1.0, 4096, truncate=True)
    assert not torch.allclose(yarn_frequencies(RELEASED)[0], yarn_frequencies(rounded)[0], rtol=1e-3)


def test_a_rotation_keeps_norms_and_depends_on_distance_alone() -> None:
    plain = Yarn(64, 10000.0, 1.0, 32.0, 1.0, 4096, truncate=False)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(i: int, j: int) -> float:
        turned = [apply_rope(x, *rope_tables(plain, torch.tensor([p]), torch.float32)) for x, p in ((q, i), (k, j))]
        assert float(turned[0].norm()) == pytest.approx(float(q.norm()), rel=1e-5)
        return float((turned[0] * turned[1]).sum())

    assert score(10, 3) == pytest.approx(score(107, 100), abs=1e-3)
    assert score(10, 3) != pytest.approx(score(11, 3), abs=1e-3)
