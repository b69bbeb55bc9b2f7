"""What the makers publish of their chips: the roof of every estimate.

Sources, read in November 2026: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x (Ironwood)";
v4's links from Jouppi et al. (arXiv 2304.01433); NVIDIA's data sheets of the A100, H100 and H200.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip (of a GPU: one card).

    name: ours. kind: a pattern of what JAX calls it (`device_kind`). flops: dense bfloat16 FLOP/s. memory: bytes.
    bandwidth: bytes/s of its memory. links: bytes/s that it sends to its neighbours, all links together, one way.
    network: bytes/s that it sends to other slices; 0 where that is not published. devices: JAX devices a chip. config:
    the TPU compiler's name of how the cores of a chip are joined; "" for GPUs. target: the GPU compiler's name of a
    card, without its maker; "" for TPUs. cube: a 3D torus, else a 2D one.
    """

    name: str
    kind: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float = 0.0
    devices: int = 1
    config: str = ""
    cube: bool = False
    target: str = ""

    @property
    def tpu(self) -> bool:
        """Whether the TPU compiler builds for it."""
        return bool(self.config)


GB, GIB, TF = 1e9, 2.0**30, 1e12

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", r"TPU v4$", 275 * TF, 32 * GIB, 1200 * GB, 300 * GB, config="megacore", cube=True),
        Chip("v5e", r"TPU v5 ?(lite|e)", 197 * TF, 16 * GIB, 819 * GB, 200 * GB, 3.125 * GB, config="default"),
        Chip("v5p", r"TPU v5p?$", 459 * TF, 95 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, config="megacore", cube=True),
        Chip("v6e", r"TPU v6 ?(lite|e)", 918 * TF, 32 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, config="default"),
        Chip("tpu7x", r"TPU ?7x", 2307 * TF, 192 * GIB, 7380 * GB, 600 * GB, devices=2, config="default", cube=True),
        Chip("a100", r"\bA100\b", 312 * TF, 80 * GB, 2039 * GB, 300 * GB, target="A100-SXM4-80GB"),
        Chip("h100", r"\bH100\b(?!.*(PCIe|NVL))", 989 * TF, 80 * GB, 3350 * GB, 450 * GB, target="H100 80GB HBM3"),
        Chip(
            "h200",
            r"\bH200\b(?!.*(PCIe|NVL))",
            989 * TF,
            141 * GB,
            4800 * GB,
            450 * GB,
            target="H200 141GB HBM3e",
        ),
    )
}


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX gives this `device_kind`; None for one that is not here, and for any CPU."""
    return next((chip for chip in CHIPS.values() if re.search(chip.kind, device_kind)), None)


def peak(kind: str, devices: int) -> float | None:
    """FLOP/s of so many JAX devices of a kind, dense bfloat16; None for a kind that is not in the table."""
    chip = of_kind(kind)
    return chip.flops * devices / chip.devices if chip else None
