"""Trees and their one layout on disk.

Layers are always apart there (``layers/0``, ``layers/1``), also inside optimizer moments, so that a run may be saved
scanned and restored per layer, and the reverse. (Not Adafactor's in mid-stage: its placeholders have no layers.)
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax import params as trees
from lvlm_jax.checkpoint import manifest
from lvlm_jax.checkpoint.manifest import ARRAYS, CheckpointError, located


def by_path(tree: Any) -> tuple[dict[str, Any], Any]:
    """(running path -> leaf, treedef) of any pytree: dict keys, field names and tuple positions joined with '/'."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}, treedef


def to_disk(tree: Any) -> dict[str, Any]:
    """Any pytree of arrays -> {path on disk: array}, scanned stacks taken apart."""
    flat = {}
    for path, leaf in by_path(tree)[0].items():
        rows = trees.layer_paths(path, leaf.shape)
        flat.update({path: leaf} if rows is None else {row: leaf[i] for i, row in enumerate(rows)})
    return flat


def read(folder: Any, like: Any, verify: bool = True, partial: bool = False) -> Any:
    """A saved tree in the structure, layout and shardings of `like`."""
    folder = located(folder)
    cards = manifest.load(folder)["leaves"]
    running, treedef = by_path(like)
    wanted: dict[str, Any] = {}
    for path, leaf in running.items():
        rows = trees.layer_paths(path, leaf.shape)
        wanted.update({path: _abstract(leaf)} if rows is None else dict.fromkeys(rows, _abstract(leaf, row=True)))
    _compare(folder, {path: card for path, card in cards.items() if path in wanted or not partial}, wanted)
    owners: dict[str, list[str]] = {}
    for path in wanted:
        owner = joined(folder, cards[path]["folder"]) if "folder" in cards[path] else str(folder)
        owners.setdefault(owner, []).append(path)
    for owner, paths in owners.items():
        there = manifest.load(located(owner))["leaves"]
        if stale := [p for p in paths if there.get(p, {}).get("fingerprint") != cards[p].get("fingerprint")]:
            raise CheckpointError(f"{folder} refers to {owner} for {stale[:5]}, but that folder was rewritten since")
    got: dict[str, Any] = {}
    for owner, paths in owners.items():
        got |= _restore_arrays(located(owner), {path: wanted[path] for path in paths}, verify)
    leaves = []
    for path, leaf in running.items():
        rows = trees.layer_paths(path, leaf.shape)
        leaves.append(got.pop(path) if rows is None else _stacker(_sharding(leaf))(*[got.pop(row) for row in rows]))
    return jax.tree.unflatten(treedef, leaves)


def _restore_arrays(folder: Any, wanted: dict[str, Any], verify: bool) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    if verify and (what := manifest.damage(folder)):
        raise CheckpointError(manifest.damage_text(folder, what))
    item = trees.unflatten(wanted)
    args = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=s.sharding, global_shape=s.shape, dtype=s.dtype), item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restore = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        return trees.flatten(reader.restore(folder / ARRAYS, args=restore))


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _abstract(leaf: Any, row: bool = False) -> jax.ShapeDtypeStruct:
    sharding = _sharding(leaf)
    if row and isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:] if row else leaf.shape, leaf.dtype, sharding=sharding)


@functools.cache
def _stacker(sharding: Any) -> Any:
    return jax.jit(lambda *rows: jnp.stack(rows), out_shardings=sharding)


def card_of(leaf: Any) -> dict:
    """What a manifest says of a leaf: its shape and number type."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _compare(folder: Any, saved: dict, wanted: dict) -> None:
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    shapes = [
        f"{path}: saved {saved[path]['dtype']}{saved[path]['shape']}, wanted {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in saved and not card_of(leaf).items() <= saved[path].items()
    ]
    if not (missing or extra or shapes):
        return
    parts = [("not in the checkpoint", missing), ("only in the checkpoint", extra), ("different", shapes)]
    text = "; ".join(f"{name} ({len(rows)}): {', '.join(rows[:8])}" for name, rows in parts if rows)
    raise CheckpointError(f"{folder} holds another tree. {text}. Was the model, the stage or the optimizer changed?")


def joined(folder: Any, relative: str) -> str:
    """The path `relative` to a folder, without its dots."""
    scheme, mark, rest = str(folder).rpartition("://")
    return scheme + mark + os.path.normpath(os.path.join(rest, relative))


def fingerprints(flat: dict[str, Any]) -> dict[str, str]:
    """Path -> 64-bit hash of a leaf's bits; the same however the leaf is sharded."""
    # One after the other: small programs with a sum over devices each, none waiting for another, starve one another of
    # threads on virtual CPU devices until XLA aborts the process. Leaves of one shape share a program.
    pairs = {path: jax.device_get(_hash(leaf)) for path, leaf in flat.items()}
    return {path: f"{a:08x}{b:08x}" for path, (a, b) in pairs.items()}


@jax.jit
def _hash(x: Any) -> tuple:
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, width)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, length in enumerate(bits.shape):
        index = index * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)

    def mix(h: Any) -> Any:  # the finaliser of MurmurHash3
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    seeds = jnp.uint32(0x9E3779B9), jnp.uint32(0x7F4A7C15)
    return tuple(mix(bits.astype(jnp.uint32) ^ mix(index + seed)).sum(dtype=jnp.uint32) for seed in seeds)
