"""First weights out of other people's files, leaf by leaf: where a model begins as another one in part alone."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from lvlm_jax import params as trees
from lvlm_jax.config import ConfigError
from lvlm_jax.hub import download
from lvlm_jax.hub.safetensors_io import Overlay, TensorFolder
from lvlm_jax.keymap import Row
from lvlm_jax.shapes import Params


def initial(params: Params, rows: Sequence[Row], name: str, field: str) -> Params:
    """The parameters with the leaves of `rows` read from a file; all others stay as they are.

    Args:
      rows: key table in the names of the torch library, or of timm.
      name: folder or hub name; "" leaves everything. field: what asks for it, for errors.

    Raises:
      ConfigError: a file without these keys, or of another size.
    """
    if not name:
        return params
    with download.named(field):
        folder = TensorFolder(download.resolve(name))
    # The oldest files, BERT's among them, call a norm's two leaves gamma and beta.
    renamed = lambda key: key.replace(".gamma", ".weight").replace(".beta", ".bias")  # noqa: E731
    tensors, found = Overlay([folder], renamed), {}
    if missing := [row.theirs for row in rows if row.theirs not in tensors]:
        raise ConfigError(f"{field}={name!r} holds no {missing[0]!r} ({len(missing)} of its keys are missing)")
    for row in rows:
        found |= row.load(tensors.read(row.theirs))
    read = trees.unflatten(found)
    leaves = trees.flatten(trees.stack_layers(read) if trees.is_stacked(params) else read)
    flat = trees.flatten(params)
    for path, leaf in leaves.items():
        if leaf.shape != flat[path].shape:
            raise ConfigError(f"{field}={name!r}: {path} is {list(leaf.shape)}, the model has {list(flat[path].shape)}")
        flat[path] = jax.device_put(jnp.asarray(leaf, flat[path].dtype), flat[path].sharding)
    return trees.unflatten(flat)


def absent(name: str, field: str) -> list[str]:
    """What is wrong with a path; hub names are not looked up."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().exists():
        return [f"{field}={name!r} does not exist"]
    return []
