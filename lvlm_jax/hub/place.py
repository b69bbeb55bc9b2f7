"""From files to (sharded) arrays, tensor by tensor: no more than one tensor is held on the host besides the arrays."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lvlm_jax import mesh as meshes
from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.formats import Tensors
from lvlm_jax.hub.safetensors_io import pages
from lvlm_jax.keymap import Row
from lvlm_jax.shapes import Params


def check_shapes(folder: Tensors, rows: Sequence[Row], shapes: Params) -> None:
    """Every tensor has the shape that the config asks for; only headers are read.

    Raises:
      CheckpointError: names the key, both shapes and the likely cause.
    """
    flat = P.flatten(shapes)
    for row in rows:
        # A number repeated without memory stands for the leaf, so that the row itself says what it would write.
        leaves = {path: np.broadcast_to(np.zeros((), np.int8), flat[path].shape) for path in row.leaves}
        wanted, found = tuple(row.save(leaves).shape), folder.shape(row.theirs)
        if wanted != found:
            raise CheckpointError(
                f"{folder.file(row.theirs)}: tensor {row.theirs!r} has shape {list(found)}, but config.json asks for "
                f"{list(wanted)}. {_cause(row, wanted, found)}"
            )


def _cause(row: Row, wanted: tuple[int, ...], found: tuple[int, ...]) -> str:
    leaf = row.leaves[0]
    if leaf.endswith(("embed/table", "head/kernel")) and wanted[1:] == found[1:]:
        return f"Were words added after config.json was written? Then its vocab_size is {found[0]}"
    if leaf.endswith("position_embed") and wanted[1:] == found[1:]:
        return "Is the picture (or text) length another one? See image_size and patch_size, or max_position_embeddings"
    return "Is config.json that of another size of this model?"


def load(
    folder: Tensors,
    rows: Sequence[Row],
    shapes: Params,
    axes: Params,
    mesh: Mesh | None = None,
    dtype: Any = None,
    scan: bool = False,
) -> dict[str, jax.Array]:
    """The leaves of a folder by path.

    Args:
      rows: its key table, checked by `check_shapes`.
      shapes: of every leaf, layers apart.
      axes: logical axes of every leaf, layers stacked where `scan` is set.
      mesh: where the arrays go; default the first device.
      dtype: of the floating leaves; default what the file holds.
      scan: whether layers are stacked: each goes to its place in the stack as it is read.
    """
    flat_shapes, flat_axes = P.flatten(shapes), P.flatten(axes)
    out: dict[str, jax.Array] = {}
    for row in rows:
        for path, leaf in row.load(folder.read(row.theirs)).items():
            leaf = _own(leaf, dtype)
            stack, index = P.stack_path(path) if scan else (path, None)
            if index is None:
                out[path] = _put(leaf, _sharding(mesh, flat_axes[path], leaf.shape)).block_until_ready()
                continue
            depth = _depth(flat_shapes, stack)
            sharding = _sharding(mesh, flat_axes[stack], (depth, *leaf.shape))
            empty, place = _placing((depth, *leaf.shape), np.dtype(leaf.dtype), sharding)
            whole = out[stack] if stack in out else empty()
            if whole.dtype != leaf.dtype:
                raise CheckpointError(
                    f"{folder.path}: {row.theirs!r} is {leaf.dtype}, other layers of its stack are {whole.dtype}; "
                    "give dtype=, or load with scan=False"
                )
            layer = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
            out[stack] = place(whole, _put(leaf, layer), index).block_until_ready()
    return out


def _own(leaf: np.ndarray, dtype: Any) -> np.ndarray:
    """The leaf in rows of its own and in the number type that is asked for, in one pass."""
    wanted = np.dtype(dtype) if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    if leaf.flags.c_contiguous and wanted == leaf.dtype:
        return leaf
    out = pages(leaf.size * wanted.itemsize).view(wanted).reshape(leaf.shape)
    np.copyto(out, leaf, casting="unsafe")
    return out


def _depth(shapes: Mapping[str, Any], stack: str) -> int:
    return sum(P.stack_path(path)[0] == stack for path in shapes)


def _sharding(mesh: Mesh | None, axes: Sequence[str | None], shape: tuple[int, ...]) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, meshes.spec(mesh, axes, shape))


def _put(leaf: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


@functools.lru_cache(maxsize=64)
def _placing(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> tuple[Callable, Callable]:
    """(an empty stack, a layer put into it where it lies); the stack is donated, never copied."""
    out = {} if sharding is None else {"out_shardings": sharding}
    empty = jax.jit(lambda: jnp.zeros(shape, dtype), **out)
    place = jax.jit(
        lambda whole, layer, index: jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0),
        donate_argnums=0,
        **out,
    )
    return empty, place
