"""Keys and values of the tokens so far: rings of `sliding_window` for sliding layers, growing rows for full ones.

All layers of a kind share their slots: where a token's keys go, and which slots a sequence may look at, is worked out
once a step. A token's slot is a number, `row * capacity + place`, and layers read and write by slots alone; pages would
change how a number comes about and nothing else.
Sequences fill rows 0 .. B - 1 without gaps: the last row moves into the place of one that finishes.
Letters: R rows, B sequences in use, C slots of a row, N tokens, H query heads, K key-value heads, G = H / K,
d head size, X = 2 K: keys, then values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ossia.model.arch import Arch
from ossia.ops.attention import Backend

_FIRST_SLOTS = 256


class Lane:
    """The caches of all layers of one kind.

    window  tokens that these layers see, which is also the size of a row's ring; None: all of them
    """

    def __init__(
        self, arch: Arch, layers: Sequence[int], window: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.window, self.num_rows, self.capacity = window, 0, window or _FIRST_SLOTS
        self._shape = (2 * arch.num_kv_heads, arch.head_dim)
        self._kv = {layer: torch.empty(0, self.capacity, *self._shape, dtype=dtype, device=device) for layer in layers}
        self._unseen = torch.empty(0, self.capacity, dtype=dtype, device=device)  # 0 where a token is, else -inf
        self._base_R = torch.empty(0, dtype=torch.int64, device=device)

    def make_room(self, num_rows: int, length: int) -> None:
        """Room for `num_rows` sequences of `length` tokens; a ring has any length."""
        num_rows = max(num_rows, self.num_rows)
        capacity = (
            self.capacity if self.window is not None or length <= self.capacity else max(length, 2 * self.capacity)
        )
        if (num_rows, capacity) == (self.num_rows, self.capacity):
            return
        old = slice(self.num_rows), slice(self.capacity)
        for layer, kv in self._kv.items():
            # zeros, because a slot that holds no token is masked, but 0 * nan would be nan
            wider = kv.new_zeros(num_rows, capacity, *self._shape)
            wider[old] = kv
            self._kv[layer] = wider
        unseen = self._unseen.new_full((num_rows, capacity), -torch.inf)
        unseen[old] = self._unseen
        self._unseen, self.num_rows, self.capacity = unseen, num_rows, capacity
        self._base_R = torch.arange(num_rows, device=unseen.device) * capacity

    def slots(self, row: int, position_N: Tensor) -> Tensor:
        """The slots of tokens of one sequence, from its row and their positions; (N,) int64."""
        return row * self.capacity + self._place(position_N)

    def step_slots(self, position_B: Tensor) -> Tensor:
        """The slots of the tokens at `position_B` of rows 0 .. B - 1, from now on seen; (B,) int64."""
        slot_B = self._base_R[: len(position_B)] + self._place(position_B)
        self._unseen.view(-1).index_fill_(0, slot_B, 0.0)
        return slot_B

    def see(self, row: int, length: int) -> None:
        """Row `row` holds a sequence of `length` tokens, and nothing else."""
        self._unseen[row] = -torch.inf
        self._unseen[row, :length] = 0.0  # all of a ring, where the length is beyond it

    def write(self, layer: int, slot_N: Tensor, kv_NXd: Tensor) -> None:
        """Put keys and values (N, 2K, d), keys first, into slots (N,) int64."""
        self._kv[layer].view(-1, *self._shape).index_copy_(0, slot_N, kv_NXd)

    def move(self, source: int, target: int) -> None:
        """Copy a row onto another."""
        for kv in self._kv.values():
            kv[target] = kv[source]
        self._unseen[target] = self._unseen[source]

    def read(self, layer: int, num_rows: int, longest: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows 0 .. num_rows - 1, views (B, K, C, d), as far as the longest sequence goes."""
        kv_BKCd = self._kv[layer][:num_rows, : self._used(longest)].transpose(1, 2)
        keys, values = kv_BKCd.chunk(2, dim=1)
        return keys, values

    def mask(self, num_rows: int, longest: int, shortest: int) -> Tensor | None:
        """What to add to the scores of `read`'s slots, (B, 1, 1, C); None where every row has filled all of them."""
        used = self._used(longest)
        return None if shortest >= used else self._unseen[:num_rows, None, None, :used]

    def _place(self, position_N: Tensor) -> Tensor:
        return position_N if self.window is None else position_N % self.window

    def _used(self, longest: int) -> int:
        return min(longest, self.capacity)


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
    q_BKGd = q_BHd.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    sinks_KG = sinks_H.view(num_kv_heads, -1)
    scale = head_dim**-0.5
    if backend != "cpu":
        return _attend_reference(q_BKGd, keys_BKCd, values_BKCd, sinks_KG, mask_B11C, scale).view_as(q_BHd)
    out_BKGd, lse_BKG = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BKGd, keys_BKCd, values_BKCd, 0.0, False, attn_mask=mask_B11C, scale=scale
    )
    share_BKG = (lse_BKG - sinks_KG).sigmoid_()  # as in ops/attention.py: float32, applied before rounding
    return (out_BKGd * share_BKG.unsqueeze(-1)).to(q_BHd.dtype).reshape(num_rows, num_heads, head_dim)


def _attend_reference(
    q_BKGd: Tensor, keys_BKCd: Tensor, values_BKCd: Tensor, sinks_KG: Tensor, mask_B11C: Tensor | None, scale: float
) -> Tensor:
    """The definition, in float32, on any device."""
    scores_BKGC = torch.matmul(q_BKGd.float(), keys_BKCd.float().transpose(-1, -2)) * scale
    if mask_B11C is not None:
        scores_BKGC += mask_B11C.float()
    sinks = sinks_KG.float()[None, :, :, None].expand(len(q_BKGd), -1, -1, 1)
    weights_BKGC = torch.cat((scores_BKGC, sinks), dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(weights_BKGC, values_BKCd.float()).to(q_BKGd.dtype)
