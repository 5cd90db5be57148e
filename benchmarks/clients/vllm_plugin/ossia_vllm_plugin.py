"""For trying adapters in vLLM's CPU build: as soon as LoRA is on it chooses Triton for the experts, which a CPU lacks.

Adapters on attention need nothing of the kind, so while it chooses, LoRA is said to be off. Not for use elsewhere.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """What vLLM calls in each of its processes."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    choose = unquantized.select_unquantized_moe_backend

    def select(moe_config: Any, *others: Any, **named: Any) -> Any:
        before, moe_config.is_lora_enabled = moe_config.is_lora_enabled, False
        try:
            return choose(moe_config, *others, **named)
        finally:
            moe_config.is_lora_enabled = before

    unquantized.select_unquantized_moe_backend = select
    unquantized_fused_moe_method.select_unquantized_moe_backend = select
