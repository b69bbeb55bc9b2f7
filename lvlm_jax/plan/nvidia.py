"""GPUs nobody holds: the CUDA plugin's compiler and its own descriptions of them, on a machine without a driver."""

import functools
import importlib.util
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlm_jax import process
from lvlm_jax.chips import Chip
from lvlm_jax.config import ConfigError
from lvlm_jax.plan import NoCompiler

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin")
LIBRARY = "xla_cuda_plugin.so"
NO_COMPILER = (
    "no compiler for NVIDIA GPUs is installed: pip install 'lvlm-jax[plan-cuda]' (JAX's CUDA plugin, which needs no "
    "GPU and no driver)"
)


def devices(chip: Chip, count: int) -> list[Any]:
    """So many cards of one host.

    Raises:
      NoCompiler: no plugin is installed.
      ConfigError: it knows no such card.
    """
    from jax.experimental import topologies

    target = _target(chip)
    try:
        with process.environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):  # it would look for a driver
            found = topologies.get_topology_desc(
                platform="cuda", topology_name=chip.name, target_config=target, topology=f"1x1x{count}"
            )
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"the CUDA plugin cannot compile for {chip.name}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def _target(chip: Chip) -> str:
    """The plugin's description of a card (a `GpuTargetConfigProto` as text), which stands in its binary."""
    found = {name: text for text in _targets(_library()) if (name := _name(text))}
    if chip.target not in found:
        raise ConfigError(f"the CUDA plugin describes no {chip.target!r}; it has {sorted(found)}")
    return found[chip.target]


def _name(text: str) -> str:
    found = re.search(r'device_description_str: "NVIDIA ([^"]*)"', text)
    return found[1] if found else ""


def _library() -> Path:
    for name in PLUGINS:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # not even the package around it
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / LIBRARY).is_file():
                return path
    raise NoCompiler(NO_COMPILER)


@functools.cache
def _targets(library: Path) -> tuple[str, ...]:
    return tuple(_texts(library))


def _texts(library: Path) -> Iterator[str]:
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(b"gpu_device_info {")
        while at >= 0:
            end = data.find(b"\0", at)
            yield data[at:end].decode(errors="replace")
            at = data.find(b"gpu_device_info {", end)
