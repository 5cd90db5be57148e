"""Ways between GPUs, at their data sheets' rates: none was measured, and a collective never quite reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PCIE = "PCIe"


@dataclass(frozen=True, slots=True)
class Link:
    """A way out of a GPU or, `shared`, out of a machine for all of its GPUs.

    gb_s  GB/s (10^9 bytes) in one direction
    """

    name: str
    gb_s: float
    source: str
    shared: bool = False

    @property
    def is_pcie(self) -> bool:
        """Whether it is the way to the machine's memory as well."""
        return self.name == PCIE

    def bytes_s(self, gpus: int) -> float:
        """Of each of a machine's `gpus`, when all of them send."""
        return self.gb_s * 1e9 / (gpus if self.shared else 1)


def _nvlink(generation: int, both_gb_s: float, gpu: str) -> Link:
    return Link(
        f"NVLink {generation}", both_gb_s / 2, f"NVIDIA's {gpu} data sheet: {both_gb_s:g} GB/s, both directions"
    )


NVLINK_3 = _nvlink(3, 600, "A100")
NVLINK_4 = _nvlink(4, 900, "H100 SXM")
NVLINK_5 = _nvlink(5, 1800, "B200")
INFINIBAND = Link("InfiniBand", 50.0, "NDR, one port of 400 Gb/s a GPU (ConnectX-7), as a DGX H100 has it")
ETHERNET = Link("Ethernet", 12.5, "one port of 100 Gb/s a machine (IEEE 802.3bj)", shared=True)
NETWORKS: Mapping[str, Link] = MappingProxyType({"infiniband": INFINIBAND, "ethernet": ETHERNET})
_NVLINKS = {"A100-40": NVLINK_3, "A100-80": NVLINK_3, "H100": NVLINK_4, "H200": NVLINK_4, "B200": NVLINK_5}


def inner_link(gpu: str, host_gb_s: float) -> Link:
    """Between GPUs of one machine: NVLink where the GPU has it in every form, else PCIe.

    host_gb_s  of the GPU's way to the machine's memory, which is PCIe
    """
    return _NVLINKS.get(gpu) or Link(PCIE, host_gb_s, "the GPU's way to the machine's memory")
