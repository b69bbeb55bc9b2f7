"""Devices nobody holds: what a compiler needs to build a program for them on this machine's CPU."""

import dataclasses
import importlib.util
import math
import re
from typing import Any

from lvlm_jax import process
from lvlm_jax.chips import CHIPS, Chip
from lvlm_jax.config import ConfigError
from lvlm_jax.mesh import Absent
from lvlm_jax.plan import NoCompiler, nvidia

NAMED = re.compile(r"(?P<chip>[a-z0-9]+):(?P<shape>\d+(x\d+)*)")
EXAMPLES = "v5p:4x4x4, v5e:16x16, h100:8"
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
"""Tells libtpu that it is on no TPU machine: it would wait for the metadata server of one, and lock the chips."""
HOST = 8
"""Cards of a host, all joined by NVLink; beyond it they are joined by a network of the owner's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """So many chips in a shape. shape: chips along each side of a slice. slices: such shapes, joined by a network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        return self.name + (f" x {self.slices}" if self.slices > 1 else "")

    @property
    def name(self) -> str:
        """Of one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def memory(self) -> float:
        """Bytes that a device has."""
        return self.chip.memory / self.chip.devices

    @property
    def wraps(self) -> tuple[bool, bool, bool]:
        """Which sides are closed to rings: all of a cube of whole racks (4 x 4 x 4), both of a whole 16 x 16 pod."""
        if self.chip.cube:
            return (all(side % 4 == 0 for side in self.shape),) * 3
        return (self.shape == (16, 16),) * 2 + (False,)


def parse(name: str, slices: int = 1) -> Topology:
    """``v5p:4x4x4`` as a `Topology`, of one or several slices.

    Raises:
      ConfigError: an unknown chip, a shape that is none, or one that such chips do not come in.
    """
    if slices < 1:
        raise ConfigError(f"--slices={slices}: at least one")
    found = NAMED.fullmatch(name.strip().lower())
    if found is None:
        raise ConfigError(f"--topology={name}: a chip and its shape, such as {EXAMPLES}")
    chip = CHIPS.get(found["chip"])
    if chip is None:
        raise ConfigError(f"--topology={name}: no plans for {found['chip']!r}; choose one of {', '.join(CHIPS)}")
    shape = tuple(int(side) for side in found["shape"].split("x"))
    if chip.tpu:
        _check_tpu(name, chip, shape)
    elif len(shape) != 1 or not 1 <= shape[0] <= HOST or slices > 1:
        raise ConfigError(f"--topology={name}: plans for GPUs are of one host, {chip.name}:1 to {chip.name}:{HOST}")
    return Topology(chip=chip, shape=shape, slices=slices)


def _check_tpu(name: str, chip: Chip, shape: tuple[int, ...]) -> None:
    sides = 3 if chip.cube else 2
    if len(shape) != sides or not math.prod(shape):
        example = "4x4x4" if chip.cube else "4x4"
        raise ConfigError(f"--topology={name}: a shape of {chip.name} has {sides} side(s), as in {chip.name}:{example}")


def no_compiler(chip: Chip) -> str:
    """That no compiler for such chips is installed, and how to install it."""
    if not chip.tpu:
        return nvidia.NO_COMPILER
    return "no compiler for TPUs is installed: pip install 'lvlm-jax[plan]' (libtpu, which needs no TPU)"


def devices(topology: Topology) -> list[Any]:
    """Devices that programs can be compiled for, and not run on.

    Raises:
      NoCompiler: none for them is installed.
      ConfigError: it knows no such shape.
    """
    if not topology.chip.tpu:
        return nvidia.devices(topology.chip, topology.chips)
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(no_compiler(topology.chip))
    from jax.experimental import topologies

    try:
        with process.environment(**ALONE):
            return list(topologies.get_topology_desc(platform="tpu", **_tpu_options(topology)).devices)
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"--topology={topology}: the compiler knows no such shape: {first}") from error


def devices_or_absent(topology: Topology) -> list[Any] | Absent:
    """`devices`, or their number alone where no compiler for them is installed."""
    try:
        return devices(topology)
    except NoCompiler:
        return absent(topology)


def absent(topology: Topology) -> Absent:
    """The number of its devices alone: for plans by arithmetic, which take no time."""
    return Absent(topology.chips * topology.chip.devices, topology.slices)


def _tpu_options(topology: Topology) -> dict[str, Any]:
    # Without `wrap` a torus compiles as a mesh: another program, with other collectives.
    return {
        "topology_name": topology.name,
        "chip_config_name": topology.chip.config,
        "chips_per_host_bounds": _host(topology.shape),
        "num_slices": topology.slices,
        "wrap": topology.wraps,
    }


def _host(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Chips of a host along each side: four in a square, or what there is of them."""
    x, y = shape[:2]
    return (2 if x % 2 == 0 else 1, 2 if y % 2 == 0 else 1, 1)
