"""Device meshes and the logical axis names that map onto them.

A weight names its axes once, where it is born (`nn/linear.py`); a preset says which mesh axis each name is cut along.
Presets by name: ``DP`` (weights on every device), ``FSDP`` (weights cut over all devices along their width) and
``FSDP_TP`` (as FSDP, and heads, MLP and vocabulary cut over the ``tensor`` axis).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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

PRESETS: dict[str, Rules] = {
    "DP": {"batch": ("data", "fsdp")},
    "FSDP": {"batch": ("data", "fsdp"), "embed": ("fsdp",)},
    "FSDP_TP": {
        "batch": ("data", "fsdp"),
        "embed": ("fsdp",),
        "mlp": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "vocab": ("tensor",),
    },
}

_RULES: dict[Mesh, Rules] = {}


def compute_dtype() -> tuple[Any, str]:
    """(dtype to compute in, why): what the default device is fast at.

    bfloat16 on TPUs and on GPUs since NVIDIA's compute capability 8.0; float16 on the older ones (a T4 has 7.5), which
    have no fast bfloat16; float32 on a CPU.
    """
    device = jax.devices()[0]
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


def make_mesh(preset: str = "DP", devices: Sequence[Any] | None = None, tensor: int | None = None) -> Mesh:
    """A mesh with the axes ``data, fsdp, tensor`` over all (or the given) devices.

    Args:
      preset: a key of `PRESETS`.
      devices: default all devices of the default backend.
      tensor: devices along the tensor axis of ``FSDP_TP``; default 2 (all devices, if there are fewer).
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown mesh preset {preset!r}; the presets are {', '.join(PRESETS)}")
    if tensor is not None and preset != "FSDP_TP":
        raise ValueError(f"tensor={tensor}: only FSDP_TP has a tensor axis, the preset is {preset}")
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    tensor = (min(2, count) if tensor is None else tensor) if preset == "FSDP_TP" else 1
    if count % tensor:
        raise ValueError(f"{count} devices do not divide into a tensor axis of {tensor}")
    sizes = {"DP": (count, 1, 1), "FSDP": (1, count, 1), "FSDP_TP": (1, count // tensor, tensor)}[preset]
    # Explicit axes, the default since jax 0.8, make flax.linen's constraints assert.
    mesh = jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    _RULES[mesh] = PRESETS[preset]
    return mesh


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Trace and run inside: sets the mesh and its axis rules, so that `constrain` takes effect. None does nothing."""
    if mesh is None:
        yield
        return
    rules = [(name, _RULES[mesh].get(name)) for name in AXES]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """States how an activation is cut; a no-op outside `use`.

    Raises:
      ValueError: an unknown name, or a number of names that is not the number of axes.
    """
    check_names(names)
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of {x.ndim} axes {x.shape}")
    return nn.with_logical_constraint(x, tuple(names))


def spec(mesh: Mesh, names: Sequence[str | None] | None, shape: Sequence[int]) -> PartitionSpec:
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


def shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every leaf of a `Batch` is cut: the leading axis over the data axes."""
    return NamedSharding(mesh, PartitionSpec(_RULES[mesh]["batch"]))
