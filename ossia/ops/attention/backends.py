"""One record a backend of attention: what it can do, and its functions. Choosing and asking for one goes through these.

`reference`  the definition over all pairs, any device
`cpu`        torch's flash kernel for CPU
`flash`      torch's own varlen flash kernels for CUDA (FlashAttention 2)
`fa3`, `fa4` FlashAttention 3 or 4 under the same operators, where their package is installed. Not tried yet, so only by
             being asked for
`triton`     our own kernels, for GPUs and dtypes without a flash kernel
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ossia.errors import UserError
from ossia.ops.attention import cpu, flash, reference, tiled
from ossia.ops.attention.kept import Kept
from ossia.ops.attention.segments import Segments

Backend = Literal["reference", "cpu", "flash", "fa3", "fa4", "triton"]
Ability = Literal["documents apart", "windows", "sinks", "gradients of sinks"]
ABILITIES: frozenset[Ability] = frozenset(get_args(Ability))
HALF = (torch.float16, torch.bfloat16)


class Attend(Protocol):
    """Of a pack with itself, see `sink_attention`; documents that share rows are taken apart before."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, segments: Segments, window: int | None, scale: float,
        kept: Kept | None = None, /,
    ) -> Tensor: ...  # fmt: skip


class Prefix(Protocol):
    """Of a document's last tokens, see `prefix_attention`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None, scale: float, /
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where attention is to run. capability  of a CUDA device, like (8, 0); size  of a head"""

    device_type: str
    dtype: torch.dtype
    size: int
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, size: int) -> Place:
        """A device that is here."""
        return cls(
            device.type, dtype, size, torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        )


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """What a backend of attention can do.

    name            as a recipe calls it; what  as a person would
    knows           `Ability`
    devices         device types; None: any
    dtypes          None: any
    sizes           of heads; None: any
    capabilities    compute capabilities, from and below; None: any
    package         that has to be installed beside torch
    automatic       whether `auto` may take it
    """

    name: Backend
    what: str
    attend: Attend
    prefix: Prefix
    knows: frozenset[Ability] = ABILITIES
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    sizes: tuple[int, ...] | None = None
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None = None
    package: str | None = None
    automatic: bool = True

    def lacks(self, place: Place) -> str | None:
        """Why it can't run there; None: it can."""
        if missing := ABILITIES - self.knows:
            return f"training needs {_list(sorted(missing))}, which it doesn't know"
        if self.devices is not None and place.device_type not in self.devices:
            return f"it runs on {_list(self.devices)}, and this is {place.device_type}"
        if self.dtypes is not None and place.dtype not in self.dtypes:
            return f"it computes in {_list(map(_name, self.dtypes))}, and this is {_name(place.dtype)}"
        if self.sizes is not None and place.size not in self.sizes:
            return f"its heads are of {_list(map(str, self.sizes))} numbers, and these of {place.size}"
        if self.capabilities is not None and place.capability is not None:
            low, below = self.capabilities
            if not low <= place.capability < below:
                rule = f"compute capability {_version(low)} up to below {_version(below)}"
                return f"it needs {rule}, and this GPU has {_version(place.capability)}"
        if self.package is not None and find_spec(self.package.partition(".")[0]) is None:
            return f"it needs the package `{self.package}`, which isn't installed"
        return None


def _flash(
    name: Backend,
    what: str,
    implementation: flash.Implementation | None,
    capabilities: tuple[tuple[int, int], tuple[int, int]],
    *,
    package: str | None = None,
    automatic: bool = True,
) -> AttentionBackend:
    return AttentionBackend(
        name,
        what,
        partial(flash.attend, implementation),
        partial(flash.prefix, implementation),
        devices=("cuda",),
        dtypes=HALF,
        sizes=tuple(range(8, 257, 8)),
        capabilities=capabilities,
        package=package,
        automatic=automatic,
    )


_RECORDS = (
    AttentionBackend(
        "cpu",
        "torch's flash kernel for CPU",
        cpu.attend,
        cpu.prefix,
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
    ),
    _flash("fa3", "FlashAttention 3", "FA3", ((9, 0), (10, 0)), package="flash_attn_interface", automatic=False),
    _flash("fa4", "FlashAttention 4", "FA4", ((9, 0), (11, 0)), package="flash_attn", automatic=False),
    _flash("flash", "torch's FlashAttention 2", None, ((8, 0), (100, 0))),
    AttentionBackend(
        "triton",
        "Ossia's Triton kernels",
        tiled.attend,
        tiled.prefix,
        devices=("cuda",),
        dtypes=(*HALF, torch.float32),
        sizes=(16, 32, 64, 128),
        package="triton",
    ),
    AttentionBackend(
        "reference",
        "the definition over all pairs of tokens",
        reference.attend,
        partial(reference.prefix, reference.dense_attention),
    ),
)
BACKENDS: Mapping[Backend, AttentionBackend] = {record.name: record for record in _RECORDS}
assert set(BACKENDS) == set(get_args(Backend))


def candidates(place: Place) -> list[AttentionBackend]:
    """What `auto` may take there, the fastest first; never empty."""
    return [record for record in BACKENDS.values() if record.automatic and record.lacks(place) is None]


def pick_backend(place: Place) -> Backend:
    """The fastest backend that is exact there."""
    return candidates(place)[0].name


def check_backend(name: Backend, place: Place) -> Backend:
    """The backend that was asked for. Raises UserError, naming those that can, if it can't run there."""
    if (reason := BACKENDS[name].lacks(place)) is not None:
        able = [record.name for record in BACKENDS.values() if record.lacks(place) is None]
        raise UserError(
            f"attention: {name} ({BACKENDS[name].what}) can't be used here: {reason}\n"
            f"  next: use {_list(able, 'or')}; `auto` takes {pick_backend(place)}"
        )
    return name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _list(words: Iterable[str], last: str = "and") -> str:
    *some, end = words
    return f"{', '.join(some)} {last} {end}" if some else end
