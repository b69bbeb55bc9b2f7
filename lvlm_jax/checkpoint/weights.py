"""The parameters of a whole model in a folder; what stands in another folder already is stored by reference."""

import os
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import manifest
from lvlm_jax.checkpoint.layout import card_of, fingerprints, joined, read, to_disk
from lvlm_jax.checkpoint.manifest import ARRAYS, CheckpointError, cleared, is_saved, located
from lvlm_jax.hosts import agree


def save_params(folder: str | os.PathLike, params: Any, *, elsewhere: Iterable[str | os.PathLike] = ()) -> None:
    """Writes parameters once. A leaf that stands bit for bit in one of the folders `elsewhere` is stored by reference.

    References are relative, so a working directory may move as a whole. Sameness is a 64-bit fingerprint of the bits,
    computed where the array lives.

    Raises:
      CheckpointError: it could not be written; says why.
    """
    import orbax.checkpoint as ocp

    folder = located(folder)
    flat = to_disk(params)
    prints = fingerprints(flat)
    leaves = {path: card_of(leaf) | {"fingerprint": prints[path]} for path, leaf in flat.items()}
    for path, owner in _elsewhere(folder, leaves, elsewhere).items():
        leaves[path]["folder"] = os.path.relpath(owner, str(folder))
    own = {path: leaf for path, leaf in flat.items() if "folder" not in leaves[path]}
    try:
        cleared(folder)
        if own:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
                saver.save(folder / ARRAYS, args=ocp.args.PyTreeSave(trees.unflatten(own)))
        if jax.process_index() == 0:
            manifest.write(folder, leaves)
    except Exception as error:
        raise CheckpointError(f"saving to {folder} failed: {manifest.reason(error)}") from error
    agree(0)


def _elsewhere(folder: Any, leaves: dict[str, dict], others: Iterable[str | os.PathLike]) -> dict[str, str]:
    """Path -> folder that holds the leaf's bits already, and whole."""
    found: dict[str, str] = {}
    harmed: dict[str, str] = {str(folder): "it is about to be written"}
    for other in map(located, others):
        if str(other) == str(folder) or not is_saved(other):
            continue
        try:
            cards = manifest.load(other)["leaves"]
        except CheckpointError as error:
            warnings.warn(f"{error}. Nothing is stored by reference to it", stacklevel=3)
            continue
        for path, card in cards.items():
            if path in found or card | {"folder": None} != leaves.get(path, {}) | {"folder": None}:
                continue
            owner = joined(other, card["folder"]) if "folder" in card else str(other)
            if owner not in harmed:
                harmed[owner] = manifest.damage(owner)
                if harmed[owner]:
                    warnings.warn(f"{owner} is damaged ({harmed[owner]}): nothing refers to it", stacklevel=3)
            if not harmed[owner]:
                found[path] = owner
    return found


def load_params(folder: str | os.PathLike, like: Any = None, partial: bool = False) -> dict:
    """Parameters that `save_params` wrote: in the layout and shardings of `like`, else per layer on the first device.

    Number types are the file's, not `like`'s: a stage casts what it runs. partial: the folder may hold more than that.

    Raises:
      CheckpointError: no complete checkpoint there, damaged files, another tree, a reference whose folder is gone.
    """
    folder = located(folder)
    cards = manifest.load(folder)["leaves"]
    if like is None:
        like = trees.unflatten({p: jax.ShapeDtypeStruct(c["shape"], jnp.dtype(c["dtype"])) for p, c in cards.items()})

    def as_saved(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        card = cards.get((trees.layer_paths(path, leaf.shape) or [path])[0], {"dtype": leaf.dtype})
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(card["dtype"]), sharding=getattr(leaf, "sharding", None))

    flat = {path: as_saved(path, leaf) for path, leaf in trees.flatten(like).items()}
    return read(folder, trees.unflatten(flat), partial=partial)


def saved_fingerprints(folder: str | os.PathLike) -> dict[str, str]:
    """Path -> fingerprint of what `save_params` wrote."""
    return {path: card["fingerprint"] for path, card in manifest.load(located(folder))["leaves"].items()}


def saved_shapes(folder: str | os.PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and number type of what `save_params` wrote, layers apart."""
    cards = manifest.load(located(folder))["leaves"]
    return {path: jax.ShapeDtypeStruct(tuple(c["shape"]), jnp.dtype(c["dtype"])) for path, c in cards.items()}
