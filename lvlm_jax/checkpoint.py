"""Checkpoints on disk: Orbax arrays in one layout, and a manifest that says what is whole.

A folder is complete when it holds ``manifest.json``, written last: every leaf with shape and dtype, every file with its
size and, on a file system without checksums of its own, its SHA-256 (Orbax restores a flipped bit without a word).
Layers are always apart on disk (``layers/0``, ``layers/1``), also inside optimizer moments, so that a run may be saved
scanned and restored per layer, and the reverse. (Not Adafactor's in mid-stage: its placeholders have no layers.)
"""

import functools
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import params as trees

ARRAYS, MANIFEST = "arrays", "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint, ours or a public one, that is missing, damaged or of another model; names the file or key."""


class Checkpoints:
    """The numbered checkpoints of one stage, written in the background, the newest `keep` of them.

    save: returns when the arrays are off the device. latest: the newest complete step, or None. restore: into the
    structure, layout and shardings of `like`. wait: until the last save is on disk; raises what went wrong there.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2) -> None:
        self.folder = _path(folder)
        self.keep = keep
        self._saver: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tree: Any) -> None:
        """Starts to write `tree` (any pytree of arrays) as this step; an older one of the same number is replaced."""
        import orbax.checkpoint as ocp

        self.wait()
        if self._saver is None:
            self._saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        flat = to_disk(tree)
        target = self.folder / str(step)
        _clear(target)
        self._saver.save(target / ARRAYS, args=ocp.args.PyTreeSave(trees.unflatten(flat)))
        leaves = {path: _card(leaf) for path, leaf in flat.items()}
        self._thread = threading.Thread(target=self._finish, args=(step, leaves), name=f"checkpoint-{step}")
        self._thread.start()

    def _finish(self, step: int, leaves: dict) -> None:
        try:
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(self.folder / str(step), leaves)
                for old in self.steps()[: -self.keep]:
                    self._delete(old)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Blocks until the save under way is complete on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"saving to {self.folder} failed: {error}") from error

    def steps(self) -> list[int]:
        """Complete steps, ascending; a folder without a manifest was cut off while it was written."""
        if not self.folder.exists():
            return []
        names = [entry.name for entry in self.folder.iterdir()]
        return sorted(int(name) for name in names if name.isdigit() and (self.folder / name / MANIFEST).exists())

    def latest(self) -> int | None:
        """The newest complete step, the same on every host."""
        self.wait()
        step = agree(max(self.steps(), default=-1))
        return None if step < 0 else step

    def restore(self, step: int | None = None, *, like: Any) -> Any:
        """The tree of a step. Without `step`: the newest whose files are whole, with a warning for each passed over.

        like: pytree of arrays or of `jax.ShapeDtypeStruct` with shardings (none: the first device).

        Raises:
          CheckpointError: no such step; damaged files; another tree, with the paths on both sides.
        """
        if step is not None:
            return read(self.folder / str(step), like)
        while (newest := self.latest()) is not None:
            folder = self.folder / str(newest)
            if not (damage := _damage(folder, _manifest(folder))):
                return read(folder, like, verify=False)
            warnings.warn(f"{folder} is damaged ({damage}); falling back to the checkpoint before it", stacklevel=2)
            if jax.process_index() == 0:
                (folder / MANIFEST).rename(folder / "manifest.damaged.json")
            agree(0)
        raise CheckpointError(f"{self.folder} holds no complete checkpoint")

    def clear(self) -> None:
        """Deletes every checkpoint: a run that starts anew must not resume from the one before it."""
        self.wait()
        _clear(self.folder)

    def _delete(self, step: int) -> None:
        folder = self.folder / str(step)
        (folder / MANIFEST).unlink()  # first, so that a half-deleted step is not taken for a whole one
        folder.rmtree()


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of a whole model


def save_params(folder: str | os.PathLike, params: Any, *, elsewhere: Iterable[str | os.PathLike] = ()) -> None:
    """Writes parameters once. A leaf that stands bit for bit in one of the folders `elsewhere` is stored by reference.

    References are relative, so a working directory may move as a whole. Sameness is a 64-bit fingerprint of the bits,
    computed where the array lives.
    """
    import orbax.checkpoint as ocp

    folder = _path(folder)
    flat = to_disk(params)
    prints = fingerprints(flat)
    leaves = {path: _card(leaf) | {"fingerprint": prints[path]} for path, leaf in flat.items()}
    for other in map(_path, elsewhere):
        if str(other) == str(folder) or not (other / MANIFEST).exists():
            continue
        for path, card in _manifest(other)["leaves"].items():
            here = leaves.get(path, {"folder": ""})
            if "folder" not in here and card | {"folder": None} == here | {"folder": None}:
                owner = _join(other, card["folder"]) if "folder" in card else str(other)
                if owner != str(folder):  # rewriting a folder that another one refers to
                    here["folder"] = os.path.relpath(owner, str(folder))
    _clear(folder)
    own = {path: leaf for path, leaf in flat.items() if "folder" not in leaves[path]}
    if own:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
            saver.save(folder / ARRAYS, args=ocp.args.PyTreeSave(trees.unflatten(own)))
    if jax.process_index() == 0:
        _write_manifest(folder, leaves)
    agree(0)


def load_params(folder: str | os.PathLike, like: Any = None, partial: bool = False) -> dict:
    """Parameters that `save_params` wrote: in the layout and shardings of `like`, else per layer on the first device.

    Number types are the file's, not `like`'s: a stage casts what it runs. partial: the folder may hold more than that.

    Raises:
      CheckpointError: no complete checkpoint there, damaged files, another tree, a reference whose folder is gone.
    """
    folder = _path(folder)
    cards = _manifest(folder)["leaves"]
    if like is None:
        like = trees.unflatten({p: jax.ShapeDtypeStruct(c["shape"], jnp.dtype(c["dtype"])) for p, c in cards.items()})

    def as_saved(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        card = cards.get((trees.layer_paths(path, leaf.shape) or [path])[0], {"dtype": leaf.dtype})
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(card["dtype"]), sharding=getattr(leaf, "sharding", None))

    flat = {path: as_saved(path, leaf) for path, leaf in trees.flatten(like).items()}
    return read(folder, trees.unflatten(flat), partial=partial)


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a complete checkpoint."""
    return (_path(folder) / MANIFEST).exists()


def saved_fingerprints(folder: str | os.PathLike) -> dict[str, str]:
    """Path -> fingerprint of what `save_params` wrote."""
    return {path: card["fingerprint"] for path, card in _manifest(_path(folder))["leaves"].items()}


def saved_shapes(folder: str | os.PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and number type of what `save_params` wrote, layers apart."""
    cards = _manifest(_path(folder))["leaves"]
    return {path: jax.ShapeDtypeStruct(tuple(c["shape"]), jnp.dtype(c["dtype"])) for path, c in cards.items()}


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


# ---------------------------------------------------------------------------------------------------------------------
# Trees and their layout on disk


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
    folder = _path(folder)
    manifest = _manifest(folder)
    running, treedef = by_path(like)
    wanted: dict[str, Any] = {}
    for path, leaf in running.items():
        rows = trees.layer_paths(path, leaf.shape)
        wanted.update({path: _abstract(leaf)} if rows is None else dict.fromkeys(rows, _abstract(leaf, row=True)))
    leaves = {path: card for path, card in manifest["leaves"].items() if path in wanted or not partial}
    _compare(folder, leaves, wanted)
    owners: dict[str, list[str]] = {}
    for path in wanted:
        card = manifest["leaves"][path]
        owners.setdefault(_join(folder, card["folder"]) if "folder" in card else str(folder), []).append(path)
    for owner, paths in owners.items():
        there = _manifest(_path(owner))["leaves"]
        if stale := [
            p for p in paths if there.get(p, {}).get("fingerprint") != manifest["leaves"][p].get("fingerprint")
        ]:
            raise CheckpointError(f"{folder} refers to {owner} for {stale[:5]}, but that folder was rewritten since")
    got: dict[str, Any] = {}
    for owner, paths in owners.items():
        got |= _restore_arrays(_path(owner), {path: wanted[path] for path in paths}, verify)
    leaves = []
    for path, leaf in running.items():
        rows = trees.layer_paths(path, leaf.shape)
        leaves.append(got.pop(path) if rows is None else _stacker(_sharding(leaf))(*[got.pop(row) for row in rows]))
    return jax.tree.unflatten(treedef, leaves)


def _restore_arrays(folder: Any, wanted: dict[str, Any], verify: bool) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    manifest = _manifest(folder)
    if verify and (damage := _damage(folder, manifest)):
        raise CheckpointError(f"{folder} is damaged: {damage}; delete it, or restore another step")
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


def _card(leaf: Any) -> dict:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _compare(folder: Any, saved: dict, wanted: dict) -> None:
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    shapes = [
        f"{path}: saved {saved[path]['dtype']}{saved[path]['shape']}, wanted {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in saved and not _card(leaf).items() <= saved[path].items()
    ]
    if not (missing or extra or shapes):
        return
    parts = [("not in the checkpoint", missing), ("only in the checkpoint", extra), ("different", shapes)]
    text = "; ".join(f"{name} ({len(rows)}): {', '.join(rows[:8])}" for name, rows in parts if rows)
    raise CheckpointError(f"{folder} holds another tree. {text}. Was the model, the stage or the optimizer changed?")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _path(folder: Any) -> Any:
    from etils import epath

    text = os.fspath(folder)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _join(folder: Any, relative: str) -> str:
    scheme, mark, rest = str(folder).rpartition("://")
    return scheme + mark + os.path.normpath(os.path.join(rest, relative))


def _clear(folder: Any) -> None:
    if jax.process_index() == 0:
        if folder.exists():
            (folder / MANIFEST).unlink(missing_ok=True)
            folder.rmtree()
        folder.mkdir(parents=True)
    agree(0)


def _manifest(folder: Any) -> dict:
    if not (folder / MANIFEST).exists():
        why = "it was cut off while it was written" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{folder} holds no complete checkpoint: {why}")
    return json.loads((folder / MANIFEST).read_text())


def _write_manifest(folder: Any, leaves: dict) -> None:
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    manifest = {"leaves": leaves, "files": _files(folder), "versions": versions}
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1))
    unfinished.rename(folder / MANIFEST)


def _files(folder: Any) -> dict[str, dict]:
    """Every file below ``arrays``: its size, and its SHA-256 where the store (gs://) does not checksum by itself."""
    out, waiting = {}, [folder / ARRAYS] if (folder / ARRAYS).exists() else []
    while waiting:
        for entry in sorted(waiting.pop().iterdir()):
            if entry.is_dir():
                waiting.append(entry)
            else:
                name = str(entry)[len(str(folder)) + 1 :]
                out[name] = {"size": entry.stat().length}
                if "://" not in str(folder):
                    with open(entry, "rb") as file:
                        out[name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def _damage(folder: Any, manifest: dict) -> str:
    """What differs between the files and the manifest, '' if nothing; found by one host for all."""
    text = ""
    if jax.process_index() == 0:
        now, then = _files(folder), manifest["files"]
        lost = sorted(then.keys() - now.keys())
        changed = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
        text = f"missing files {lost[:3]}" if lost else f"changed files {changed[:3]}" if changed else ""
    return text or ("files differ from the manifest" if agree(int(bool(text))) else "")


def agree(value: int) -> int:
    """The first host's value on every host; also a barrier. Free on one host."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
