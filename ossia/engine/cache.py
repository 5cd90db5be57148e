"""Keys and values of the tokens so far, in blocks: a sequence holds the blocks it fills and no more.

A sliding layer's sequence holds one block of `sliding_window` slots, which it writes as a ring; a full layer's holds as
many blocks of 64 as its length needs. All layers of a kind share their block numbers, so where a token goes is worked
out once a step. Sequences that begin alike share full blocks: each block counts who holds it, and only a block that
will still be written is copied. What is running is rows 0 .. B - 1 of each lane's table, without gaps.
With `int8` a slot's head is 8-bit numbers and one float32 scale, its largest magnitude / 127: 53% of bfloat16's bytes
at 64 numbers a head, for an error of at most half a scale a number.
Letters: R rows, B rows in use, M blocks of a row, C slots read, N tokens, H query heads, K key-value heads, G = H / K,
d head size, X = 2 K: keys, then values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ossia.kernels.cpu.pages import large_zeros
from ossia.model.arch import Arch
from ossia.ops.attention import Backend, dense_attention
from ossia.sizes import FULL_BLOCK

_FIRST_BLOCKS = 8


class Lane:
    """The caches of all layers of one kind.

    index     its place among the lanes, and so among a sequence's lists of blocks
    int8      whether slots are of 8 bits
    window    tokens that these layers see, which is also the size of their one block; None: all of them
    block     slots of a block
    table_RM  int32: the blocks of each row. Position p of a row is in slot
              `table_RM[row, place // block] * block + place % block`, place being p, or p % window.
              Rows that nothing runs in hold block 0, which is nobody's: a batch may be filled up with them
    changes   how often the table or the pools have become other tensors
    """

    def __init__(
        self,
        index: int,
        arch: Arch,
        layers: Sequence[int],
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
        int8: bool,
    ) -> None:
        self.index, self.window, self.layers, self.int8 = index, window, tuple(layers), int8
        self.block = window or FULL_BLOCK
        self._dtype, self._slot_shape = dtype, (2 * arch.num_kv_heads, arch.head_dim)
        stored = torch.int8 if int8 else dtype
        self._pools = {layer: torch.empty(0, *self._slot_shape, dtype=stored, device=device) for layer in layers}
        scales = torch.empty(0, self._slot_shape[0], dtype=torch.float32, device=device)
        self._scales = {layer: scales.clone() for layer in layers} if int8 else {}
        self.changes = 0
        self._holders: list[int] = []  # of each block
        self._free: list[int] = []
        self.table_RM = torch.zeros(0, 1, dtype=torch.int32, device=device)
        slot_bytes = self._slot_shape[0] * (self._slot_shape[1] * stored.itemsize + (4 if int8 else 0))
        self.block_bytes = self.block * slot_bytes * len(self.layers)

    def pool(self, layer: int) -> Tensor:
        """A layer's keys and values by slot, (slots, 2K, d). Another tensor after the pool has grown."""
        return self._pools[layer]

    @property
    def num_used(self) -> int:
        """Blocks that someone holds."""
        return max(len(self._holders) - len(self._free) - 1, 0)

    def num_blocks(self, length: int) -> int:
        """Blocks of a sequence of `length` tokens."""
        return 1 if self.window is not None else -(-length // self.block)

    def place(self, position_N: Tensor) -> Tensor:
        """A position's place among its sequence's slots."""
        return position_N if self.window is None else position_N % self.window

    def slots(self, blocks: Sequence[int], position_N: Tensor) -> Tensor:
        """The slots of a sequence's positions, from the blocks it holds; (N,) int64."""
        place_N = self.place(position_N)
        blocks_M = torch.tensor(blocks, device=position_N.device)
        return blocks_M[place_N // self.block] * self.block + place_N % self.block

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence that the table has columns for."""
        return self.table_RM.shape[1] * self.block

    def row_slots(self, row_B: Tensor, position_B: Tensor) -> Tensor:
        """The slots of one position of each row, from the table; (B,) int64."""
        place_B = self.place(position_B)
        return self.table_RM[row_B, place_B // self.block].long() * self.block + place_B % self.block

    def take(self, limit: int) -> int:
        """A block of one's own. `limit`: what the pool may grow to, in blocks, if it has to."""
        if not self._free:
            enough = max(limit + 1, len(self._holders) + 1, 2)  # with block 0
            self._grow(min(max(2 * len(self._holders), _FIRST_BLOCKS), enough))
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One holder more."""
        assert self._holders[block] > 0, block
        self._holders[block] += 1

    def give_back(self, block: int) -> None:
        """One holder less; the last one's block is free."""
        assert self._holders[block] > 0, block
        self._holders[block] -= 1
        if not self._holders[block]:
            self._free.append(block)

    def copy(self, block: int, limit: int) -> int:
        """A block of one's own with the same content."""
        mine = self.take(limit)
        for pool in (*self._pools.values(), *self._scales.values()):
            blocks = pool.unflatten(0, (-1, self.block))
            blocks[mine] = blocks[block]
        return mine

    def set_row(self, row: int, blocks: Sequence[int]) -> None:
        """Row `row` of the table; it grows as needed."""
        num_rows, width = self.table_RM.shape
        if row >= num_rows or len(blocks) > width:
            self._widen(max(num_rows, 2 * (row + 1)), width if len(blocks) <= width else 2 * len(blocks))
        self.table_RM[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def clear_row(self, row: int) -> None:
        """Nothing runs in this row any more."""
        self.table_RM[row] = 0

    def reserve_rows(self, num_rows: int) -> None:
        """Let the table have at least so many rows."""
        if num_rows > len(self.table_RM):
            self._widen(num_rows, self.table_RM.shape[1])

    def _widen(self, num_rows: int, width: int) -> None:
        wider = self.table_RM.new_zeros(num_rows, width)
        wider[: self.table_RM.shape[0], : self.table_RM.shape[1]] = self.table_RM
        self.table_RM = wider
        self.changes += 1

    def tensors(self, layer: int) -> list[Tensor]:
        """What `write` writes into, indexed by slot."""
        return [self._pools[layer], *([self._scales[layer]] if self._scales else [])]

    def write(self, layer: int, slot_N: Tensor, kv_NXd: Tensor) -> None:
        """Put keys and values (N, 2K, d), keys first, into slots (N,) int64."""
        if self._scales:
            scale_NX = kv_NXd.abs().amax(-1).float() / 127
            self._scales[layer].index_copy_(0, slot_N, scale_NX)
            kv_NXd = (kv_NXd.float() / scale_NX.clamp(min=1e-30)[..., None]).round_().to(torch.int8)
        self._pools[layer].index_copy_(0, slot_N, kv_NXd)

    def at(self, layer: int, slot: Tensor) -> Tensor:
        """Keys and values of slots, (*slot, 2K, d) of the model's dtype: a copy."""
        kv = self._pools[layer][slot]
        return (kv * self._scales[layer][slot][..., None]).to(self._dtype) if self._scales else kv

    def read(self, layer: int, row_B: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows, as far as the longest of them goes: copies, (B, K, C, d) each."""
        blocks_BM = self.table_RM[row_B, : self.num_blocks(longest)]
        slots_BMS = blocks_BM[..., None] * self.block + torch.arange(self.block, device=blocks_BM.device)
        keys, values = self.at(layer, slots_BMS.flatten(1)).transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def mask(self, length_B: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """What to add to the scores of `read`'s slots, (B, 1, 1, C)."""
        num_slots = self.num_blocks(longest) * self.block
        seen_BC = torch.arange(num_slots, device=length_B.device) < length_B[:, None]
        return torch.zeros(seen_BC.shape, dtype=dtype, device=length_B.device).masked_fill_(~seen_BC, -torch.inf)[
            :, None, None
        ]

    def _grow(self, num_blocks: int) -> None:
        for pools in (self._pools, self._scales):
            for layer, pool in pools.items():
                # zeros, because a slot that holds no token is masked, but 0 * nan would be nan
                shape = (num_blocks * self.block, *pool.shape[1:])
                wider = large_zeros(shape, pool.dtype) if pool.device.type == "cpu" else pool.new_zeros(shape)
                wider[: len(pool)] = pool
                pools[layer] = wider
        self.changes += 1
        self._free += reversed(range(max(len(self._holders), 1), num_blocks))
        self._holders += [0] * (num_blocks - len(self._holders))


Holding = list[list[int]]
"""The blocks of one sequence: by lane, in the order of its positions."""


class Cache:
    """The lanes of a model, and the bytes that they may grow to together.

    lanes    one for each kind of layer
    of_layer each layer's lane
    """

    def __init__(
        self, arch: Arch, dtype: torch.dtype, device: torch.device, max_bytes: int, *, int8: bool = False
    ) -> None:
        windows = [arch.sliding_window if kind == "sliding_attention" else None for kind in arch.layer_types]
        by_window = {
            window: Lane(index, arch, [i for i, w in enumerate(windows) if w == window], window, dtype, device, int8)
            for index, window in enumerate(dict.fromkeys(windows))
        }
        self.lanes, self.of_layer = list(by_window.values()), [by_window[window] for window in windows]
        self.max_bytes = max_bytes

    @property
    def used_bytes(self) -> int:
        return sum(lane.num_used * lane.block_bytes for lane in self.lanes)

    @property
    def num_used(self) -> int:
        """Blocks in use, of all lanes."""
        return sum(lane.num_used for lane in self.lanes)

    def has_room(self, length: int, spare_blocks: int = 0) -> bool:
        """Whether a new sequence of `length` tokens fits, and that many blocks more of full layers."""
        spare = sum(spare_blocks * lane.block_bytes for lane in self.lanes if lane.window is None)
        wanted = sum(lane.num_blocks(length) * lane.block_bytes for lane in self.lanes)
        return self.used_bytes + wanted + spare <= self.max_bytes

    def new(self) -> Holding:
        return [[] for _ in self.lanes]

    def extend(self, holding: Holding, length: int, *, force: bool = False) -> bool:
        """Give a sequence the blocks of `length` tokens. False, and nothing is taken, where they'd be too many bytes.

        force  take them anyway: a sequence that runs alone always goes on
        """
        lacking = [max(lane.num_blocks(length) - len(mine), 0) for lane, mine in zip(self.lanes, holding, strict=True)]
        if not any(lacking):
            return True
        wanted = sum(count * lane.block_bytes for count, lane in zip(lacking, self.lanes, strict=True))
        if not force and self.used_bytes + wanted > self.max_bytes:
            return False
        for count, lane, mine in zip(lacking, self.lanes, holding, strict=True):
            mine += [lane.take(self._limit(lane)) for _ in range(count)]
        return True

    def room(self, holding: Holding) -> float:
        """How long the sequence may get with the blocks it has."""
        sizes = zip(self.lanes, holding, strict=True)
        return min((len(mine) * lane.block for lane, mine in sizes if lane.window is None), default=float("inf"))

    def fork(self, holding: Holding, length: int) -> Holding:
        """A second sequence with the same first `length` tokens: full blocks are shared, the others copied."""
        forked = self.new()
        for lane, theirs, mine in zip(self.lanes, holding, forked, strict=True):
            whole = 0 if lane.window is not None else length // lane.block
            for block in theirs[:whole]:
                lane.hold(block)
            mine += theirs[:whole]
            mine += [lane.copy(block, self._limit(lane)) for block in theirs[whole : lane.num_blocks(length)]]
        return forked

    def release(self, holding: Holding) -> None:
        """Give all blocks of a sequence back."""
        for lane, mine in zip(self.lanes, holding, strict=True):
            for block in mine:
                lane.give_back(block)
            mine.clear()

    def set_row(self, row: int, holding: Holding) -> None:
        """What runs in row `row` from now on, or what it holds now."""
        for lane, mine in zip(self.lanes, holding, strict=True):
            lane.set_row(row, mine)

    def clear_row(self, row: int) -> None:
        """Nothing runs in this row any more."""
        for lane in self.lanes:
            lane.clear_row(row)

    def _limit(self, lane: Lane) -> int:
        return lane.num_used + max(self.max_bytes - self.used_bytes, 0) // lane.block_bytes


def attend_cached(
    q_BHd: Tensor, keys_BKCd: Tensor, values_BKCd: Tensor, sinks_H: Tensor, mask_B11C: Tensor | None, backend: Backend
) -> Tensor:
    """Attention of one query a sequence over its cache, with a sink in each head's softmax.

    The query heads of a key-value head are taken as its queries, so keys are read once and no head is repeated.
    mask_B11C  additive, of q's dtype; None: all slots are seen
    Returns    (B, H, d) of q's dtype
    """
    num_rows, num_heads, head_dim = q_BHd.shape
    num_kv_heads = keys_BKCd.shape[1]
    scale = head_dim**-0.5
    if backend != "cpu":
        q_BH1d = q_BHd.unsqueeze(2)
        return dense_attention(q_BH1d, keys_BKCd, values_BKCd, sinks_H, mask_B11C, scale).squeeze(2)
    q_BKGd = q_BHd.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    sinks_KG = sinks_H.view(num_kv_heads, -1)
    out_BKGd, lse_BKG = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BKGd, keys_BKCd, values_BKCd, 0.0, False, attn_mask=mask_B11C, scale=scale
    )
    share_BKG = (lse_BKG - sinks_KG).sigmoid_()  # as in ops.attention.sinks: float32, applied before rounding
    return (out_BKGd * share_BKG.unsqueeze(-1)).to(q_BHd.dtype).reshape(num_rows, num_heads, head_dim)
