"""A decode step in C: the model's tensors as pointers, and one call for all layers.

Same numbers as `engine/decode.py`, its reference; tests/engine holds the two together. Nothing big is copied: attention
and router weights are read where they are, experts too, packed ones as MXFP4 codes. Copied are norms, sinks and biases
(as float32), and adapters (B transposed, a few MB).
Letters: B rows, D hidden, L layers, E experts, k experts a token, r rank, F rotary frequencies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ossia.engine.cache import Lane
from ossia.engine.head import Draw, Drawn
from ossia.engine.prefill import Prompt
from ossia.kernels.cpu import native
from ossia.kernels.cpu.native import Kernels, Unavailable, load_kernels
from ossia.kernels.cpu.pages import Pages
from ossia.model.lora import MODULE_OF, Lora
from ossia.model.transformer import Transformer
from ossia.model.weights import EXPERT_WEIGHTS, expert_module
from ossia.ops.rope import rope_tables

_FIRST_POSITIONS = 1024  # of the rotary tables, which double when a sequence outgrows them
_THREAD_PRODUCTS = 4_000_000  # multiplications of a step that are worth a thread
_HEAD_THREAD_PRODUCTS = 2_000_000  # the same of the head
_READ_HIDDEN = 1024  # of a larger model, torch's own matrix products are the faster way through a prompt
_PANEL_BYTES = 1 << 26  # of all matrices of a float32 model, up to which they are copied in the order they are read
_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
_PANEL_KINDS = {torch.float32: native.FLOAT32_PANELS, torch.bfloat16: native.BFLOAT16_PANELS}


def find_kernels(model: Transformer, adapters: Sequence[Lora | None]) -> Kernels | Unavailable:
    """The compiled library if this model can be decoded with it; else why not, in a line."""
    if model.device.type != "cpu" or model.dtype not in _KINDS:
        return Unavailable(f"for float32 and bfloat16 on a CPU; this model is {model.dtype} on {model.device}")
    if model.lora is None and len(model.trainable.tensors) and len(adapters) > 1:
        return Unavailable("adapters beside a model whose own weights are trained need those as they were")
    if model.qat and any(lora is not model.lora for lora in adapters):
        return Unavailable("`qat` merges one adapter into the experts; others beside it need experts of their own")
    return load_kernels()


class Panels:
    """Copies of a small model's matrices in the order in which C reads them best, kept while they stay the same.

    Sums over small inputs then need no additions across lanes. Of float32 models alone: bfloat16 has instructions of
    its own.
    """

    def __init__(self, num_bytes: int) -> None:
        self._pages = Pages(num_bytes)
        self._of: dict[str, tuple[Tensor, int | None, Tensor]] = {}

    @classmethod
    def wanted(cls, model: Transformer) -> Panels | None:
        """Room for them, if this model is to have any."""
        arch = model.arch
        attention = 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim + arch.num_experts
        num_bytes = 4 * arch.num_layers * arch.hidden_size * (attention + 3 * arch.num_experts * arch.intermediate_size)
        # twice: some begin as bfloat16, and once they are trained have floats as well
        return cls(2 * num_bytes) if model.dtype == torch.float32 and num_bytes <= _PANEL_BYTES else None

    def of(self, name: str, weight_EOD: Tensor) -> Tensor:
        """A matrix as panels, (..., O / PANEL, D, PANEL): bfloat16 where that is exact, which halves its bytes."""
        source, version, panels = self._of.get(name, (None, None, None))
        now = None if weight_EOD.is_inference() else weight_EOD._version  # such a tensor doesn't count its changes
        same = source is not None and source.data_ptr() == weight_EOD.data_ptr()
        if panels is not None and same and now is not None and version == now:
            return panels
        exact = weight_EOD.bfloat16()
        laid = exact if torch.equal(exact.to(weight_EOD.dtype), weight_EOD) else weight_EOD
        laid = laid.unflatten(-2, (-1, native.PANEL)).transpose(-2, -1)
        fits = panels is not None and (panels.dtype == laid.dtype or panels.dtype == torch.float32)
        panels = panels.copy_(laid) if panels is not None and fits else self._pages.copy(laid)
        self._of[name] = weight_EOD, now, panels
        return panels


class NativeDecoder:
    """`TorchDecoder` in C: float32 and bfloat16, on a CPU. A row's result doesn't depend on the rows beside it.

    lanes     each layer's lane
    adapters  the first is the model's own; None: the model without one
    kernels   what `find_kernels` found
    panels    what `Panels.wanted` made for this model, maybe for an earlier decoder
    """

    def __init__(
        self,
        model: Transformer,
        lanes: Sequence[Lane],
        adapters: Sequence[Lora | None],
        kernels: Kernels,
        panels: Panels | None = None,
    ) -> None:
        self._model, self._adapters, self._kernels = model, list(adapters), kernels
        self._lanes, self._panels = list(lanes), panels
        self._held: list[Tensor] = []  # what the structs below point into
        self._tables = (torch.empty(0), torch.empty(0))
        self._workspace = self._head_workspace = torch.empty(0, dtype=torch.uint8)
        self._sized_for: tuple[int, int] = (0, 0)
        self._lane_structs = (native.Lane * len(self._lanes))()
        self._pointed_at: list[int] = []  # what the lanes' `changes` were when the structs were filled
        self.reads_prompts = model.arch.hidden_size <= _READ_HIDDEN
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read weights and adapters again."""
        arch = self._model.arch
        self._held, self._sized_for = [], (0, 0)
        self._places: tuple[Sequence[int], ctypes.Array[ctypes.c_int32]] = ((), _ints(()))
        self._layers = (native.Layer * arch.num_layers)(*map(self._layer, range(arch.num_layers)))
        modules = [f"model.layers.{i}.{MODULE_OF[name]}" for i in range(arch.num_layers) for name in native.TARGETS]
        factors = [self._factors(lora, module) for lora in self._adapters for module in modules]
        self._factors_ALM = (native.Factors * len(factors))(*factors)
        attention = 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim
        experts = 3 * arch.experts_per_token * arch.intermediate_size
        self._row_products = arch.num_layers * arch.hidden_size * (attention + experts)
        self._struct = native.Model(
            layers=self._layers,
            factors=self._factors_ALM,
            num_layers=arch.num_layers,
            num_adapters=len(self._adapters),
            hidden=arch.hidden_size,
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            width=arch.intermediate_size,
            num_experts=arch.num_experts,
            top_k=arch.experts_per_token,
            bf16=self._model.dtype == torch.bfloat16,
            tiles=self._kernels.uses_tiles and self._model.dtype == torch.bfloat16,
            max_rank=max(factor.rank for factor in factors),
            rms_eps=arch.rms_eps,
            swiglu_limit=arch.swiglu_limit,
            swiglu_alpha=arch.swiglu_alpha,
        )

    def use(self, adapters: Sequence[Lora | None]) -> None:
        """See `Decoder.use`."""
        assert not self._model.qat, "experts are merged with the model's own adapter"
        self._adapters = list(adapters)
        self.refresh()

    @torch.no_grad()
    def forward(
        self, x_BD: Tensor, position_B: Tensor, adapter_B: Sequence[int], routes_LBk: Tensor | None = None
    ) -> Tensor:
        """See `Decoder.forward`."""
        self._point_at_caches(len(x_BD))
        return self._run(x_BD, position_B, adapter_B, routes_LBk)

    @torch.no_grad()
    def read(self, x_TD: Tensor, parts: Sequence[tuple[Prompt, int]], routes_LTk: Tensor | None = None) -> Tensor:
        """See `Decoder.read`."""
        position_T = torch.cat([torch.arange(prompt.done, prompt.done + count) for prompt, count in parts])
        adapter_T, sequence_T, first_T = [], [], []
        for number, (prompt, count) in enumerate(parts):
            first_T += [len(first_T)] * count
            sequence_T += [number] * count
            adapter_T += [prompt.adapter] * count
        tables, self._pointed_at = [self._table(lane, parts) for lane in self._lanes], []
        for index, (lane, struct) in enumerate(zip(self._lanes, self._lane_structs, strict=True)):
            _point_at(struct, lane, index, tables[index])
        out_TD = self._run(x_TD, position_T, adapter_T, routes_LTk, _ints(sequence_T), _ints(first_T))
        return out_TD[torch.tensor([count for _, count in parts]).cumsum(0) - 1]

    def _table(self, lane: Lane, parts: Sequence[tuple[Prompt, int]]) -> Tensor:
        """The blocks of prompts in a lane, (S, M) int32."""
        blocks = [prompt.holding[lane.index] for prompt, _ in parts]
        width = max(map(len, blocks))
        return torch.tensor([[*mine, *[0] * (width - len(mine))] for mine in blocks], dtype=torch.int32)

    def _run(
        self,
        x_BD: Tensor,
        position_B: Tensor,
        adapter_B: Sequence[int],
        routes_LBk: Tensor | None,
        sequence_B: ctypes.Array[ctypes.c_int32] | None = None,
        first_B: ctypes.Array[ctypes.c_int32] | None = None,
    ) -> Tensor:
        num_rows = len(x_BD)
        # a second thread has to be woken, which takes longer than a small step
        threads = max(1, min(torch.get_num_threads(), num_rows * self._row_products // _THREAD_PRODUCTS))
        x_BD, position_B = x_BD.contiguous(), position_B.contiguous()
        assert x_BD.dtype == self._model.dtype, x_BD.dtype
        assert position_B.dtype == torch.int64, position_B.dtype
        assert len(adapter_B) == num_rows == len(position_B)
        if self._places[0] is not adapter_B:  # the same list, step by step
            assert set(adapter_B) <= set(range(len(self._adapters))), adapter_B
            self._places = (adapter_B, _ints(adapter_B))
        routes = None if routes_LBk is None else routes_LBk.contiguous()
        assert routes is None or routes.dtype == torch.int16, routes.dtype
        cos_TF, sin_TF = self._rotary(max(position_B.tolist()) + 1)
        self._make_room(num_rows, threads)
        out_BD = torch.empty_like(x_BD)
        call = native.Call(
            x=x_BD.data_ptr(),
            out=out_BD.data_ptr(),
            positions=position_B.data_ptr(),
            adapters=self._places[1],
            cos=cos_TF.data_ptr(),
            sin=sin_TF.data_ptr(),
            lanes=self._lane_structs,
            routes=None if routes is None else routes.data_ptr(),
            workspace=-(-self._workspace.data_ptr() // 64) * 64,
            sequence=sequence_B,
            first=first_B,
            rows=num_rows,
            threads=threads,
        )
        self._kernels.decode(self._struct, call)
        if routes_LBk is not None and routes is not routes_LBk:
            routes_LBk.copy_(routes)
        return out_BD

    def draw(self, h_BD: Tensor, head_VD: Tensor, draw: Draw) -> Drawn:
        """See `Decoder.draw`: the head's bytes are read once, and logits that nobody wants are never in memory."""
        num_products = len(h_BD) * head_VD.numel()
        threads = max(1, min(torch.get_num_threads(), num_products // _HEAD_THREAD_PRODUCTS))
        num_bytes = self._kernels.head_workspace_bytes(len(h_BD), *head_VD.shape[::-1], threads) + 64
        if num_bytes > len(self._head_workspace):
            self._head_workspace = torch.empty(num_bytes, dtype=torch.uint8)
        return draw_natively(self._kernels, h_BD, head_VD, draw, threads, self._head_workspace)

    def _make_room(self, num_rows: int, threads: int) -> None:
        if (num_rows, threads) != self._sized_for:
            num_bytes = self._kernels.workspace_bytes(self._struct, num_rows, threads) + 64
            if num_bytes > len(self._workspace):
                self._workspace = torch.empty(num_bytes, dtype=torch.uint8)
            self._sized_for = (num_rows, threads)

    def _point_at_caches(self, num_rows: int) -> None:
        """Pools and tables grow, and are other tensors then."""
        changes = [lane.changes for lane in self._lanes]
        if changes == self._pointed_at:
            return
        self._pointed_at = changes
        for index, (lane, struct) in enumerate(zip(self._lanes, self._lane_structs, strict=True)):
            assert len(lane.table_RM) >= num_rows
            _point_at(struct, lane, index, lane.table_RM)

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of at least `length` positions, (T, F) float32, rounded to the model's dtype."""
        size, model = len(self._tables[0]), self._model
        if size < length:
            positions_T = torch.arange(max(length, 2 * size, _FIRST_POSITIONS))
            cos_TF, sin_TF = rope_tables(model.yarn, positions_T, model.dtype)
            self._tables = (cos_TF.float(), sin_TF.float())
        return self._tables

    def _hold(self, tensor: Tensor) -> int:
        """The address of a tensor that stays where it is from now on."""
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        self._held.append(tensor)
        return tensor.data_ptr()

    def _small(self, tensor: Tensor) -> int:
        """The address of a small tensor's values in the model's dtype, as float32."""
        return self._hold(tensor.detach().to(self._model.dtype).float().contiguous())

    def _layer(self, index: int) -> native.Layer:
        name, model = f"model.layers.{index}", self._model
        matrices = [self._dense(f"{name}.{MODULE_OF[target]}") for target in native.TARGETS[:5]]
        matrices += [self._experts(index, target) for target in native.TARGETS[5:]]
        return native.Layer(
            input_norm=self._small(model.tensor(f"{name}.input_layernorm.weight")),
            post_norm=self._small(model.tensor(f"{name}.post_attention_layernorm.weight")),
            sinks=self._small(model.tensor(f"{name}.self_attn.sinks")),
            matrix=(native.Matrix * len(matrices))(*matrices),
        )

    def _weight(self, name: str) -> Tensor:
        """A weight where it lies: bfloat16 of a checkpoint is exact in float32 too. One that is trained, rounded."""
        model = self._model
        return model.tensor(name) if name in model.trainable else model.weights.raw(name)

    def _lay(self, matrix: native.Matrix, name: str, weight_EOD: Tensor, part: int) -> None:
        """Point at a weight where it lies, or at its panels; `part`: results that are taken by themselves."""
        kinds = _KINDS
        if self._panels is not None and part % native.PANEL == 0:
            weight_EOD, kinds = self._panels.of(name, weight_EOD.detach()), _PANEL_KINDS
        matrix.weight, matrix.kind = self._hold(weight_EOD.detach()), kinds[weight_EOD.dtype]

    def _dense(self, module: str) -> native.Matrix:
        weight_OD = self._weight(f"{module}.weight")
        matrix = native.Matrix(
            bias=self._small(self._weight(f"{module}.bias")), fan_in=weight_OD.shape[1], fan_out=weight_OD.shape[0]
        )
        self._lay(matrix, module, weight_OD, matrix.fan_out)
        return matrix

    def _experts(self, index: int, projection: str) -> native.Matrix:
        arch, weights, trainable = self._model.arch, self._model.weights, self._model.trainable
        module = expert_module(index, projection)
        gate_up = projection == "gate_up_proj"
        matrix = native.Matrix(
            fan_in=arch.hidden_size if gate_up else arch.intermediate_size,
            fan_out=2 * arch.intermediate_size if gate_up else arch.hidden_size,
        )
        if module in trainable:
            matrix.bias = self._small(self._model.tensor(f"{module}_bias"))
        else:
            matrix.bias = self._small(weights.expert_bias(index, projection))
        # a quarter of the bytes of what they stand for, and the memory's speed is a step's time
        reads_codes = weights.placement != "bf16" or (
            weights.checkpoint.layout == "mxfp4"
            and self._model.dtype == torch.bfloat16
            and self._kernels.multiplies_pairs
        )
        rounded = self._model.rounds(module)
        if module in trainable or not (reads_codes or rounded):
            weight_EOD = self._model.expert_weight(index, projection)
            self._lay(matrix, module, weight_EOD, matrix.fan_out // 2 if gate_up else matrix.fan_out)
            return matrix
        matrix.interleaved = gate_up
        if rounded:
            packed = self._model.packed_experts(index, projection)
            matrix.weight, matrix.kind, matrix.scales = (
                self._hold(packed.blocks),
                native.MXFP4,
                self._hold(packed.scales),
            )
        elif weights.checkpoint.layout == "bf16":
            matrix.weight, matrix.kind = self._hold(weights.raw(module)), native.BFLOAT16_COLUMNS
        else:
            matrix.weight, matrix.kind = self._hold(weights.raw(f"{module}_blocks")), native.MXFP4
            matrix.scales = self._hold(weights.raw(f"{module}_scales"))
        return matrix

    def _factors(self, lora: Lora | None, module: str) -> native.Factors:
        merged = self._model.qat and module.rpartition(".")[2] in EXPERT_WEIGHTS
        a, b = (None, None) if lora is None or merged else lora.pair(module, self._model.dtype)
        if a is None or b is None:
            return native.Factors(rank=0)
        turned = b.detach().transpose(-1, -2).contiguous()
        return native.Factors(a=self._hold(a.detach()), b=self._hold(turned), rank=a.shape[-2])


def _point_at(struct: native.Lane, lane: Lane, layer: int, table_RM: Tensor) -> None:
    pool, *scales = lane.tensors(layer)
    assert all(tensor.is_contiguous() for tensor in (table_RM, pool, *scales))
    struct.scales = scales[0].data_ptr() if scales else None
    struct.pool, struct.table, struct.table_width = pool.data_ptr(), table_RM.data_ptr(), table_RM.shape[1]
    struct.block, struct.window = lane.block, lane.window or 0


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)


def draw_natively(
    kernels: Kernels, h_BD: Tensor, head_VD: Tensor, draw: Draw, threads: int, workspace: Tensor
) -> Drawn:
    """`draw_plainly` in C, on the CPU: head and hidden states float32 or bfloat16. A row depends on no other one.

    workspace  uint8, of at least `Kernels.head_workspace_bytes` and 64 more
    """
    num_rows, (vocab, hidden) = len(h_BD), head_VD.shape
    assert head_VD.is_contiguous()
    assert head_VD.device.type == h_BD.device.type == "cpu"
    x_BD = h_BD.detach().float().contiguous()
    assert draw.temperature_B.dtype == torch.float32
    assert draw.uniform_B.dtype == torch.float64
    wanted_B = (ctypes.c_int32 * num_rows)(*[-1] * num_rows)
    for place, row in enumerate(draw.left):
        wanted_B[row] = place
    logits_LV = torch.empty(len(draw.left), vocab)
    ids_B, (logprob_B, lse_B) = torch.empty(num_rows, dtype=torch.int64), torch.empty(2, num_rows)
    kernels.draw(
        native.Head(
            x=x_BD.data_ptr(),
            weight=head_VD.data_ptr(),
            temperature=draw.temperature_B.data_ptr(),
            uniform=draw.uniform_B.data_ptr(),
            wanted=wanted_B,
            logits=logits_LV.data_ptr(),
            ids=ids_B.data_ptr(),
            logprobs=logprob_B.data_ptr(),
            sums=lse_B.data_ptr(),
            workspace=-(-workspace.data_ptr() // 64) * 64,
            rows=num_rows,
            hidden=hidden,
            vocab=vocab,
            kind=_KINDS[head_VD.dtype],
            bf16=h_BD.dtype == torch.bfloat16,
            tiles=kernels.uses_tiles and h_BD.dtype == torch.bfloat16,
            threads=threads,
        )
    )
    return Drawn(ids_B, logprob_B, lse_B, logits_LV)
