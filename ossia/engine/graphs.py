"""Decode steps as CUDA graphs: a step of a small batch is hundreds of short kernels, which cost more to launch than to
run; a graph launches them at once.

One graph for each batch size, rounded up to a power of two; the rows that fill it up hold nobody's block. A graph keeps
addresses, so it is captured anew when weights, tables or pools are others. Batches of several adapters go without, and
so do packed experts that Triton's kernels can't take. Reference: `TorchDecoder.forward`; a test on any machine holds
the shapes static.
Letters: B sequences, D hidden, L layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ossia.engine.cache import Lane
from ossia.engine.decode import TorchDecoder
from ossia.engine.head import Draw, Drawn
from ossia.engine.prefill import Prompt
from ossia.model.lora import Lora
from ossia.model.transformer import Transformer

_WARM_UPS = 2  # runs before the capture, in which libraries set themselves up


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, and the tensors that it reads and writes: of these it has the addresses alone, so they are kept here."""

    graph: torch.cuda.CUDAGraph
    row_B: Tensor
    x_BD: Tensor
    position_B: Tensor
    routes_LBk: Tensor | None
    out_BD: Tensor


class GraphDecoder:
    """`TorchDecoder` on a CUDA device, captured. The model's experts are expanded, or its layers are fused."""

    reads_prompts = False

    def __init__(self, model: Transformer, lanes: Sequence[Lane], adapters: Sequence[Lora | None]) -> None:
        self._model, self._plain, self._lanes = model, TorchDecoder(model, lanes, adapters), tuple(lanes)
        self._captured: dict[tuple[int, int, bool], _Captured] = {}
        self._addresses: tuple[int, ...] = ()

    def refresh(self) -> None:
        """See `Decoder.refresh`."""
        self._plain.refresh()
        self._captured.clear()

    def use(self, adapters: Sequence[Lora | None]) -> None:
        """See `Decoder.use`."""
        self._plain.use(adapters)
        self._captured.clear()

    def forward(
        self, x_BD: Tensor, position_B: Tensor, adapter_B: Sequence[int], routes_LBk: Tensor | None = None
    ) -> Tensor:
        """See `Decoder.forward`."""
        if len(set(adapter_B)) > 1:
            return self._plain.forward(x_BD, position_B, adapter_B, routes_LBk)
        num_rows, size = len(x_BD), 1 << (len(x_BD) - 1).bit_length()
        for lane in dict.fromkeys(self._lanes):
            lane.reserve_rows(size)
        addresses = tuple(
            tensor.data_ptr() for i, lane in enumerate(self._lanes) for tensor in (lane.table_RM, *lane.tensors(i))
        )
        if addresses != self._addresses:
            self._captured.clear()
            self._addresses = addresses
        key = (size, adapter_B[0], routes_LBk is not None)
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        captured = self._captured[key]
        captured.x_BD[:num_rows] = x_BD
        captured.position_B.zero_()
        captured.position_B[:num_rows] = position_B
        captured.graph.replay()
        if routes_LBk is not None and captured.routes_LBk is not None:
            routes_LBk.copy_(captured.routes_LBk[:, :num_rows])
        return captured.out_BD[:num_rows].clone()

    def read(self, x_TD: Tensor, parts: Sequence[tuple[Prompt, int]], routes_LTk: Tensor | None = None) -> Tensor:
        """Never called."""
        return self._plain.read(x_TD, parts, routes_LTk)

    def draw(self, h_BD: Tensor, head_VD: Tensor, draw: Draw) -> Drawn:
        """See `Decoder.draw`."""
        return self._plain.draw(h_BD, head_VD, draw)

    def _capture(self, size: int, adapter: int, wants_routes: bool) -> _Captured:
        arch, device = self._model.arch, self._model.device
        x_BD = torch.zeros(size, arch.hidden_size, dtype=self._model.residual_dtype, device=device)
        position_B = torch.zeros(size, dtype=torch.int64, device=device)
        row_B = torch.arange(size, device=device)
        shape = (arch.num_layers, size, arch.experts_per_token)
        routes_LBk = torch.zeros(shape, dtype=torch.int16, device=device) if wants_routes else None

        def run() -> Tensor:
            return self._plain.forward_rows(adapter, x_BD, row_B, position_B, routes_LBk, static=True)

        # warm-ups write at position 0 of every row: kept aside and put back
        kept = [
            (tensor, slot_B, tensor[slot_B])
            for index, lane in enumerate(self._lanes)
            for slot_B in [lane.row_slots(row_B, position_B)]
            for tensor in lane.tensors(index)
        ]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor, slot_B, content in kept:
            tensor[slot_B] = content
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_BD = run()
        return _Captured(graph, row_B, x_BD, position_B, routes_LBk, out_BD)
