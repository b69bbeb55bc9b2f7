"""Device meshes and the logical axis names that map onto them.

A weight names its axes once, where it is born (`nn/linear.py`); a preset says which mesh axis each name is cut along.
Presets by name: ``DP`` (weights on every device), ``FSDP`` (weights cut over all devices along their width),
``FSDP_TP`` (as FSDP, and heads, MLP and vocabulary cut over the ``tensor`` axis) and ``FSDP_TP_SP`` (as FSDP_TP, and
what stands between the layers cut over the ``tensor`` axis along the positions: for long rows). On several slices of
TPUs weights are cut inside a slice and copied across, since the network between slices is much slower than the links
inside one.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

AXES = {
    "batch": "text rows, or groups of vision rows",
    "length": "positions of a row",
    "embed": "width of a model, on weights",
    "mlp": "hidden width of a feed-forward",
    "heads": "query heads x head width",
    "kv_heads": "key/value heads x head width",
    "vocab": "vocabulary",
    "layers": "layers of a scanned stack",
    "positions": "rows of a learned position table, latents of a resampler",
    "patch": "values of one patch",
}
"""Every logical axis name there is; any other name is an error."""

Rules = Mapping[str, tuple[str, ...]]

_TENSOR = dict.fromkeys(("mlp", "heads", "kv_heads", "vocab"), ("tensor",))
PRESETS: dict[str, Rules] = {
    "DP": {"batch": ("data", "fsdp")},
    "FSDP": {"batch": ("data", "fsdp"), "embed": ("fsdp",)},
    "FSDP_TP": {"batch": ("data", "fsdp"), "embed": ("fsdp",), **_TENSOR},
    "FSDP_TP_SP": {"batch": ("data", "fsdp"), "embed": ("fsdp",), "length": ("tensor",), **_TENSOR},
}
"""FSDP_TP_SP is the sequence parallelism of Korthikanti et al. (arXiv 2205.05198)."""


@dataclasses.dataclass(frozen=True)
class Absent:
    """So many devices of so many slices that nothing here can make programs for: a mesh of them has sizes alone."""

    count: int
    slices: int = 1


AnyMesh = Mesh | AbstractMesh
"""Of devices, or of sizes alone."""

_CUDA = "pip install 'lvlm-jax[cuda12]' or 'lvlm-jax[cuda13]'"
EXTRAS = {"cuda": _CUDA, "gpu": _CUDA, "tpu": "pip install 'lvlm-jax[tpu]'"}
"""Backend, as JAX_PLATFORMS names it -> the extra that brings it."""

_RULES: dict[AnyMesh, Rules] = {}
_ACTIVE: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def default_devices() -> list[Any]:
    """All devices of the default backend.

    Raises:
      ValueError: JAX_PLATFORMS names a backend that cannot start here.
    """
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # jax asserts where it has left out all that it was told to start
        asked = jax.config.jax_platforms
        if not asked:
            raise
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".").splitlines()
        extra = next((extra for name, extra in EXTRAS.items() if name in asked.split(",")), None)
        fix = f"it needs such a device and its extra ({extra})" if extra else "the backends are cpu, cuda and tpu"
        raise ValueError(
            f"JAX_PLATFORMS={asked}: JAX cannot start this backend here ({reason[0] if reason else 'it finds none'}); "
            f"{fix}. Unset JAX_PLATFORMS to run on what there is"
        ) from error


def compute_dtype() -> tuple[Any, str]:
    """(dtype to compute in, why): what the default device is fast at.

    bfloat16 on TPUs and on GPUs since NVIDIA's compute capability 8.0; float16 on the older ones (a T4 has 7.5), which
    have no fast bfloat16; float32 on a CPU.
    """
    device = default_devices()[0]
    kind = getattr(device, "device_kind", device.platform)
    if device.platform == "cpu":
        return jnp.float32, f"{kind} is a CPU, slower in any shorter one"
    capability = str(getattr(device, "compute_capability", None) or "")
    if device.platform == "gpu" and capability.replace(".", "").isdigit() and float(capability) < 8:
        return jnp.float16, f"{kind}, compute capability {capability}, has no fast bfloat16"
    return jnp.bfloat16, f"{kind} is fastest in it"


def check_names(names: Sequence[str | None]) -> None:
    """Raises ValueError for a name that is not in `AXES`."""
    for name in names:
        if name is not None and name not in AXES:
            raise ValueError(f"unknown logical axis {name!r}; the axes are {', '.join(AXES)}")


def make_mesh(
    preset: str = "DP",
    devices: Sequence[Any] | Absent | None = None,
    tensor: int | None = None,
    fsdp: int | None = None,
) -> AnyMesh:
    """A mesh with the axes ``data, fsdp, tensor`` (and for FSDP_TP_SP ``sequence``) over all or the given devices.

    The data axis runs over the slices of a multislice TPU, so that weights are cut inside a slice and only gradients
    cross between slices.

    Args:
      preset: a key of `PRESETS`.
      devices: default all devices of the default backend.
      tensor: devices along the tensor axis of the presets that have one; default 2 (all devices, if there are fewer).
      fsdp: devices over which the presets with FSDP cut a weight; default all of a slice. With fewer, copies of the
        weights stand along the data axis.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown mesh preset {preset!r}; the presets are {', '.join(PRESETS)}")
    if tensor is not None and not _cuts_tensor(preset):
        raise ValueError(f"tensor={tensor}: only FSDP_TP and FSDP_TP_SP have a tensor axis, the preset is {preset}")
    if fsdp is not None and preset == "DP":
        raise ValueError(f"fsdp={fsdp}: DP cuts no weight; choose another preset, FSDP or FSDP_TP")
    for name, ways in (("tensor", tensor), ("fsdp", fsdp)):
        if ways is not None and ways < 1:
            raise ValueError(f"{name}={ways}: so many devices along that axis, at least 1")
    # Rules belong to a mesh, and to JAX meshes of equal axes are one: a further axis of one device sets this one apart.
    more = ("sequence",) if "length" in PRESETS[preset] else ()
    names = MESH_AXES + more
    types = (AxisType.Auto,) * len(names)  # explicit axes, the default since jax 0.8, fail in flax.linen
    if isinstance(devices, Absent):
        sizes = _sizes(preset, devices.count, devices.slices, tensor, fsdp)
        mesh = AbstractMesh(sizes + (1,) * len(more), names, axis_types=types)
    else:
        devices = list(default_devices() if devices is None else devices)
        placed = _arranged(devices, _sizes(preset, len(devices), slices_of(devices), tensor, fsdp))
        mesh = Mesh(placed.reshape(placed.shape + (1,) * len(more)), names, axis_types=types)
    _RULES[mesh] = PRESETS[preset]
    return mesh


def _cuts_tensor(preset: str) -> bool:
    return "mlp" in PRESETS[preset]


def slices_of(devices: Sequence[Any]) -> int:
    """Slices that TPUs come from, which a slower network joins than the links inside one; 1 for other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _sizes(preset: str, count: int, slices: int, tensor: int | None, fsdp: int | None) -> tuple[int, int, int]:
    """Devices along each of `MESH_AXES`; the data axis is a multiple of the slices."""
    if preset == "DP":
        return count, 1, 1
    inside = count // slices
    tensor = (min(2, inside) if tensor is None else tensor) if _cuts_tensor(preset) else 1
    if inside % tensor:
        raise ValueError(f"{_devices(inside, slices)} do not divide into a tensor axis of {tensor}")
    fsdp = inside // tensor if fsdp is None else fsdp
    if inside % (fsdp * tensor):
        beside = f" beside a tensor axis of {tensor}" if tensor > 1 else ""
        raise ValueError(f"{_devices(inside, slices)} do not divide into an fsdp axis of {fsdp}{beside}")
    return count // (fsdp * tensor), fsdp, tensor


def _devices(inside: int, slices: int) -> str:
    return f"{inside:,} devices" + (f" of each of {slices} slices" if slices > 1 else "")


def _arranged(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """Devices in an order whose neighbours are neighbours in the torus, slices along the first axis."""
    from jax.experimental import mesh_utils  # `jax.make_mesh` knows no slices and splits no side of a torus but v5e's

    if (slices := slices_of(devices)) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    inside = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Trace and run inside: sets the mesh and its axis rules, so that `constrain` takes effect. None does nothing."""
    if mesh is None:
        yield
        return
    rules = [(name, _RULES[mesh].get(name)) for name in AXES]
    token = _ACTIVE.set(mesh)
    try:
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            yield
    finally:
        _ACTIVE.reset(token)


def active() -> Mesh | None:
    """The mesh that `use` set, None outside."""
    return _ACTIVE.get()


def platform() -> str:
    """What the program that is traced here will run on: "cpu", "gpu" or "tpu".

    Not always what this process holds: `lvlm plan` traces for devices that nobody holds.
    """
    mesh = active()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """States how an activation is cut; a no-op outside `use`. What does not divide stays whole, as in `spec`.

    Raises:
      ValueError: an unknown name, or a number of names that is not the number of axes.
    """
    check_names(names)
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of {x.ndim} axes {x.shape}")
    mesh = active()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, names, x.shape)))


def spec(mesh: AnyMesh, names: Sequence[str | None] | None, shape: Sequence[int]) -> PartitionSpec:
    """The cut of one weight. An axis that its mesh axis does not divide stays whole (33 words on 8 devices)."""
    if names is None:
        return PartitionSpec()
    check_names(names)
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for a shape {tuple(shape)}")
    rules, used, out = _RULES[mesh], set(), []
    for name, length in zip(names, shape):
        axes = tuple(axis for axis in rules.get(name, ()) if axis not in used) if name else ()
        ways = 1
        for axis in axes:
            ways *= mesh.shape[axis]
        if ways > 1 and length % ways == 0:
            used.update(axes)
            out.append(axes if len(axes) > 1 else axes[0])
        else:
            out.append(None)
    return PartitionSpec(*out)


def shardings(mesh: AnyMesh, axes: Any, shapes: Any) -> Any:
    """Tree of `NamedSharding`, one a leaf.

    Args:
      axes: tree of tuples of logical names (see `nn.linear.axes_of`), or None for all leaves whole.
      shapes: tree of arrays or shape structs of the same structure.
    """
    if axes is None:
        return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), shapes)
    lay = lambda names: lambda part: NamedSharding(mesh, spec(mesh, names, part.shape))  # noqa: E731
    return jax.tree.map(
        lambda leaf, names: jax.tree.map(lay(names), leaf),  # a quantised leaf has parts of its own shapes
        shapes,
        axes,
        is_leaf=lambda leaf: hasattr(leaf, "shape"),
    )


def remedy(width: int, ways: int, beside: int, fsdp: int | None) -> str:
    """What to do where `ways` devices do not divide a width: another number of them, or of those asked for (`fsdp`).

    beside: devices of the mesh that each of them stands for.
    """
    common = math.gcd(width, ways)
    fewer = f"cut them over fewer: --config.fsdp={common}" if common > 1 else ""
    if fsdp is not None:
        return fewer or f"leave config.fsdp out, or give one that divides {width:,}"
    below = max(n for n in range(1, ways) if width % n == 0)
    above = min((n for n in range(ways, width + 1) if width % n == 0), default=below)
    counts = " or ".join(f"{n * beside:,}" for n in dict.fromkeys((below, above)))
    return f"{fewer and fewer + ', or '}take another number of devices, such as {counts}"


def data_shards(mesh: AnyMesh | None) -> int:
    """Pieces that the leading axis of a batch is cut into."""
    if mesh is None:
        return 1
    axes = batch_sharding(mesh).spec[0]
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """How every leaf of a `Batch` is cut: the leading axis over the data axes."""
    return NamedSharding(mesh, PartitionSpec(_RULES[mesh]["batch"]))
