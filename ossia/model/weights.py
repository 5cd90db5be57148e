"""Where a model's weights are, and in which form the computation gets them.

`mmap`: in the checkpoint's file, experts as packed bytes. `resident`: the same bytes copied to the device. `stream`:
experts in the machine's memory, two layers of them at a time on the device (`Stream`), and the embedding's rows sent as
they are looked up. `bf16`: experts expanded once, to the activations' dtype. All give the same numbers: MXFP4 expands
without rounding. Where a GPU is nearly full, embedding and head may wait in the machine's memory too (`on_host`).
Experts are computed as (experts, out, in), gate_up's gate rows before its up rows; the checkpoint interleaves the two.
Letters: E experts, I expert width, O out, D in, G groups of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ossia.kernels import pick_kernels
from ossia.kernels.cpu.pages import Room, large_zeros
from ossia.model.arch import Arch
from ossia.model.budget.weights import EMBEDDING, HEAD, is_expert_weight, is_of_experts
from ossia.model.budget.work import Placement
from ossia.model.checkpoint import Checkpoint
from ossia.model.cut.frozen import FrozenParts
from ossia.model.cut.home import Home
from ossia.model.cut.ranks import Ranks, experts_of
from ossia.model.cut.slots import TwoSlots
from ossia.model.packed import Base, Packed
from ossia.ops.memory import leave_to_the_file
from ossia.ops.mxfp4 import BLOCK, dequantize_mxfp4

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def expert_module(layer: int, projection: str) -> str:
    """A projection's name in the checkpoint."""
    return f"model.layers.{layer}.mlp.experts.{projection}"


def split_gate_up(x: Tensor) -> Tensor:
    """Rows (axis 1) from the checkpoint's order g0 u0 g1 u1 ... to g0 g1 ... u0 u1 ..."""
    return torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)


def interleave_gate_up(x: Tensor) -> Tensor:
    """The inverse of `split_gate_up`."""
    gate, up = x.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


class Weights:
    """A checkpoint's tensors, placed.

    on_host  of the embedding and the head, those that stay in the machine's memory where the device is a GPU: the
             embedding's rows are sent as they are looked up (with `stream` always), the head's as the loss walks them
    ranks    over which they are cut, with placement `resident`: of layers and head this process holds its part,
             with `offload` in the machine's memory
    staying  and it has some experts for good, which alone are in every tensor of experts then
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        dtype: torch.dtype,
        device: torch.device,
        on_host: frozenset[str] = frozenset(),
        ranks: Ranks | None = None,
        *,
        offload: bool = False,
        staying: bool = False,
    ) -> None:
        self.checkpoint, self.placement, self.dtype, self.device = checkpoint, placement, dtype, device
        self.on_host = on_host | {EMBEDDING} if placement == "stream" else on_host
        assert self.on_host <= {EMBEDDING, HEAD}, on_host
        self._held: dict[str, Tensor] = {}
        self._expanded: dict[tuple[int, str], Tensor] = {}
        self._stream: Stream | None = None
        self.parts: FrozenParts | None = None
        self.own_experts: slice | None = None
        if placement == "mmap":
            return
        if ranks is not None:
            assert placement == "resident", placement
            self.on_host = frozenset((EMBEDDING,))
            home = Home(device, offload=offload)
            self.parts = FrozenParts(checkpoint, ranks, home, staying=staying)
            if staying:
                self.own_experts = experts_of(self.arch.num_experts, ranks)
                of_experts = [name for name in checkpoint.specs if is_of_experts(name)]
                self._held = {name: home.keep(checkpoint.tensor(name)[self.own_experts].clone()) for name in of_experts}
            others = [name for name in checkpoint.specs if name not in self._held and not self._elsewhere(name)]
            self._held |= {name: self._placed(name) for name in others}
            return
        if placement == "stream":
            layers = [
                [name for name in checkpoint.specs if _streams(name, layer)] for layer in range(self.arch.num_layers)
            ]
            host = [{name: _host_copy(checkpoint.tensor(name), device) for name in names} for names in layers]
            self._stream = Stream(host, device)
        for name in checkpoint.specs:
            if placement == "stream" and is_expert_weight(name):
                continue
            if name in self.on_host:
                self._held[name] = _host_copy(checkpoint.tensor(name), device)
            elif placement in ("resident", "stream") or not is_expert_weight(name):
                self._held[name] = self._placed(name)
        if placement == "bf16":
            for layer in range(self.arch.num_layers):
                for projection in EXPERT_WEIGHTS:
                    self._expanded[layer, projection] = self._expand(layer, projection, slice(None))
                for name in checkpoint.specs:
                    if _streams(name, layer):
                        leave_to_the_file(checkpoint.tensor(name))

    def _elsewhere(self, name: str) -> bool:
        """Whether a tensor is cut over the ranks, or looked up in the file."""
        return name == EMBEDDING or (self.parts is not None and self.parts.has(name))

    def _placed(self, name: str) -> Tensor:
        """A tensor where the placement wants it: `bf16` casts it once, the others copy it as it is."""
        tensor = self.checkpoint.tensor(name)
        if self.placement == "bf16":  # on the CPU and in bf16 these are the file's own pages, not a second copy
            return tensor.to(device=self.device, dtype=self.dtype)
        placed = tensor.to(self.device) if self.device.type != "cpu" else tensor.clone()
        leave_to_the_file(tensor)
        return placed

    @property
    def arch(self) -> Arch:
        return self.checkpoint.arch

    def raw(self, name: str) -> Tensor:
        """A tensor as the checkpoint holds it, wherever it is."""
        if self.parts is not None and self.parts.has(name):
            return self.parts.tensor(name)
        held = self._held.get(name)
        return self.checkpoint.tensor(name) if held is None else held

    def get(self, name: str) -> Tensor:
        """A tensor in the computation's dtype and on its device."""
        return self.raw(name).to(device=self.device, dtype=self.dtype)

    def expert_bias(self, layer: int, projection: str) -> Tensor:
        """(E, O); gate rows before up rows."""
        bias_EO = self.get(f"model.layers.{layer}.mlp.experts.{projection}_bias")
        return split_gate_up(bias_EO) if projection == "gate_up_proj" else bias_EO

    def expert_weight(
        self, layer: int, projection: str, expert: int | slice | None = None, room: Room | None = None
    ) -> Tensor:
        """(E, O, D) in the computation's dtype, of some experts or all; (O, D) of one; expanded on the spot unless
        `bf16`. room: where they may lie on a CPU, if not in new memory."""
        expanded = self._expanded.get((layer, projection))
        if expanded is not None:
            return expanded if expert is None else expanded[expert]
        if isinstance(expert, int):
            return self._expand(layer, projection, slice(expert, expert + 1), alone=True)[0]
        return self._expand(layer, projection, slice(None) if expert is None else expert, room=room)

    def expert_base(self, layer: int, projection: str, experts: slice = slice(None)) -> Base:
        """A projection's experts as the checkpoint has them, on the device: packed, or (E, O, D) bfloat16; gate and up
        rows in turn. Some of them are fetched alone, see `_packed`."""
        prefix, alone = expert_module(layer, projection), experts != slice(None)
        if self.checkpoint.layout == "bf16":
            return self._packed(layer, prefix, experts, alone).transpose(1, 2)
        return Packed(*(self._packed(layer, prefix + part, experts, alone) for part in ("_blocks", "_scales")))

    def note_read(self, layer: int) -> None:
        """What was launched has read what `expert_base` gave."""
        if self._stream is not None:
            self._stream.note_read(layer)

    def _packed(self, layer: int, name: str, experts: slice, alone: bool) -> Tensor:
        """Some experts' part of a tensor of theirs, as the checkpoint holds it, on the device.

        alone  the layer's other experts won't be asked for: they aren't sent along
        """
        if self._stream is None:
            return self.raw(name)[experts].to(self.device)
        return (self._stream.host[layer][name] if alone else self._stream.layer(layer)[name])[experts].to(self.device)

    def _expand(
        self, layer: int, projection: str, experts: slice, *, alone: bool = False, room: Room | None = None
    ) -> Tensor:
        weight_EOD = self._expand_packed(layer, projection, experts, alone, room)
        if not alone:
            self.note_read(layer)
        return weight_EOD

    def _expand_packed(
        self, layer: int, projection: str, experts: slice, alone: bool, room: Room | None = None
    ) -> Tensor:
        prefix = expert_module(layer, projection)
        if self.checkpoint.layout == "bf16":
            weight_EOD = self._packed(layer, prefix, experts, alone).to(self.dtype).transpose(1, 2)
            return split_gate_up(weight_EOD) if projection == "gate_up_proj" else weight_EOD.contiguous()
        blocks, scales = (self._packed(layer, prefix + part, experts, alone) for part in ("_blocks", "_scales"))
        if pick_kernels(self.device, self.dtype) == "triton":
            from ossia.kernels.gpu.dequant import dequantize

            return dequantize(blocks, scales, self.dtype, split=projection == "gate_up_proj")
        out = None
        if self.device.type == "cpu":
            make = large_zeros if room is None else room.take
            out = make((*scales.shape[:-1], scales.shape[-1] * BLOCK), self.dtype)
        return dequantize_mxfp4(blocks, scales, self.dtype, out, split=projection == "gate_up_proj")

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.specs)


class Stream(TwoSlots):
    """Layers' tensors in the machine's memory, two of them at a time on a device.

    Copies go on a stream of their own and wait until what read the slot's old content is done.

    host   of each layer, its tensors by name; pinned where the device is a GPU. All layers have the same shapes
    """

    def __init__(self, host: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        super().__init__(len(host))
        self.host, self._device = host, device
        self._slots = [[torch.empty_like(tensor, device=device) for tensor in host[0].values()] for _ in range(2)]
        gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if gpu else None
        self._arrived, self._read = ([torch.cuda.Event() for _ in range(2)] if gpu else [] for _ in range(2))

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer on the device, ready for what is launched next; until two others are asked for."""
        return dict(zip(self.host[index], self._slots[self.slot_of(index)], strict=True))

    def note_read(self, index: int) -> None:
        """What reads this layer's tensors has been launched: its slot may be filled anew once that is done."""
        if self._read:
            self._read[self._holds.index(index)].record()

    def _wait(self, slot: int) -> None:
        if self._arrived:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])

    def _send(self, index: int, slot: int) -> None:
        pairs = list(zip(self._slots[slot], self.host[index].values(), strict=True))
        if self._copies is None:
            for there, here in pairs:
                there.copy_(here)
            return
        self._copies.wait_event(self._read[slot])
        with torch.cuda.stream(self._copies):
            for there, here in pairs:
                there.copy_(here, non_blocking=True)
            self._arrived[slot].record()


def _host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Where a GPU can fetch it by itself while it computes; elsewhere the checkpoint's own pages."""
    if device.type != "cuda":
        return tensor
    pinned = tensor.cpu().pin_memory()
    leave_to_the_file(tensor)
    return pinned


def _streams(name: str, layer: int) -> bool:
    return name.startswith(f"model.layers.{layer}.") and is_expert_weight(name)
