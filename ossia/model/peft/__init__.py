"""Adapters on disk, in the format of PEFT 0.21: written so that `peft` loads them, and read whoever wrote them.

```text
adapter_config.json          what is adapted: linear modules by `target_modules`, bare parameters by `target_parameters`
adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight (out, r)
```
Experts are parameters: all experts of a layer are stacked, A as (E r, in) expert after expert, B as (out, r E) with the
expert as the fastest index. PEFT wraps the module that owns a parameter, so tensors carry the module's name and not the
parameter's: `mlp.experts` for one adapted parameter; for both, `mlp.experts.base_layer` is gate_up and `mlp.experts`
down. The rows of gate_up's B alternate between gate and up, as in the checkpoint. Other versions and other programs
stored experts otherwise: `layout.py` tells which it is and converts.
Own code because training neither needs nor should wait for `peft`; it is the oracle (tests/oracle/test_peft.py).
"""

from ossia.model.peft.config import CONFIG
from ossia.model.peft.layout import LAYOUTS, LayoutName
from ossia.model.peft.places import ADAPTER_IN_RUN, RUN_TENSORS, TENSORS, find_adapter, recorded_base
from ossia.model.peft.read import load_adapter
from ossia.model.peft.write import save_adapter

__all__ = [
    "ADAPTER_IN_RUN",
    "CONFIG",
    "LAYOUTS",
    "RUN_TENSORS",
    "TENSORS",
    "LayoutName",
    "find_adapter",
    "load_adapter",
    "recorded_base",
    "save_adapter",
]
