"""The manifest of a folder of arrays: written last, so that its presence says whole, and sealed, so that damage shows.

``manifest.json`` holds every leaf with shape and dtype, every file with its size and, on a file system without
checksums of its own, its SHA-256 (Orbax restores a flipped bit without a word), the versions that wrote it, what its
writer notes (step, recipe), and the SHA-256 of all that. It is good only if its bytes are what its content is written
as.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lvlm_jax.hosts import agree
from lvlm_jax.versions import versions

ARRAYS, MANIFEST = "arrays", "manifest.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
UNSEALED = {"leaves", "files", "versions"}
"""All that a manifest held before it was sealed."""
_SEAL = "sha256"
_OS_ERROR = re.compile(r"(?:os_error_code='|OS error )(\d+)")  # TensorStore's way to say errno


class CheckpointError(ValueError):
    """A checkpoint, ours or a public one, that is missing, damaged or of another model; names the file or key."""


def located(folder: str | os.PathLike) -> Any:
    """The absolute path of a folder, here or on a remote disk."""
    from etils import epath

    text = os.fspath(folder)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def is_saved(folder: Any) -> bool:
    """Whether the folder was finished: it holds a manifest, good or not."""
    return (located(folder) / MANIFEST).exists()


def cleared(folder: Any, parents: bool = True) -> None:
    """Makes the folder, empty. Without `parents` one whose parent is gone is an error."""
    if jax.process_index() == 0:
        if folder.exists():
            (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted folder is not taken for a whole one
            folder.rmtree()
        folder.mkdir(parents=parents)
    agree(0)


def write(folder: Any, leaves: Mapping[str, dict], **notes: Any) -> None:
    """Says that the folder is whole: its leaves, its files as they stand now, and what else is to be known of it."""
    content = {"leaves": leaves, "files": _files(folder), "versions": versions(PACKAGES), **notes}
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_bytes(_sealed(content))
    unfinished.rename(folder / MANIFEST)


def load(folder: Any) -> dict:
    """The manifest of a folder.

    Raises:
      CheckpointError: there is none, or it is not as it was written.
    """
    if not is_saved(folder):
        why = "it was cut off while it was written" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{folder} holds no complete checkpoint: {why}")
    try:
        return _opened(folder)
    except ValueError as error:
        raise CheckpointError(damage_text(folder, str(error))) from error


def damage(folder: Any, step: int | None = None) -> str:
    """What is wrong with the manifest or a file of the folder, '' if nothing; looked for by one host for all.

    step: the one that the manifest must be of.
    """
    text, folder = "", located(folder)
    if jax.process_index() == 0:
        try:
            text = _changed(folder, _opened(folder), step)
        except (ValueError, OSError) as error:
            text = str(error)
    bad = agree(int(bool(text)))  # asked by all, whatever they know
    return text or ("files differ from the manifest" if bad else "")


def damage_text(folder: Any, what: str) -> str:
    """The words for a damaged folder and what to do about it."""
    return f"{folder} is damaged: {what}; delete that folder and run what wrote it again, or restore another step"


def other_versions(found: Mapping) -> str:
    """The versions in a manifest that are not those of now, '' if none."""
    now = versions(PACKAGES)
    return ", ".join(
        f"{name} {then} (now {now[name]})"
        for name, then in found["versions"].items()
        if name in now and name != "python" and then != now[name]
    )


def reason(error: BaseException) -> str:
    """Why something could not be written, in the operating system's words where Orbax and TensorStore hide them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        if code := _OS_ERROR.search(str(cause)):
            return os.strerror(int(code[1]))
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0] or type(error).__name__


def _sealed(content: dict) -> bytes:
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, _SEAL: seal}, indent=1).encode()


def _opened(folder: Any) -> dict:
    """The content of a manifest; ValueError says why it is not as it was written."""
    raw = (folder / MANIFEST).read_bytes()
    try:
        content = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{MANIFEST} is not JSON ({error})") from error
    if isinstance(content, dict) and content.keys() == UNSEALED:
        text = f"{folder / MANIFEST} was written by an older version: the files are checked, the manifest itself is not"
        warnings.warn(text, stacklevel=2)
        return content
    if not isinstance(content, dict) or content.pop(_SEAL, None) is None or raw != _sealed(content):
        raise ValueError(f"{MANIFEST} has changed since it was written")
    return content


def _changed(folder: Any, manifest: dict, step: int | None) -> str:
    """What differs between the files and the manifest."""
    if step is not None and manifest.get("step", step) != step:
        return f"{MANIFEST} is of step {manifest['step']}"
    now, then = _files(folder), manifest["files"]
    if lost := sorted(then.keys() - now.keys()):
        return f"missing files {lost[:3]}"
    changed = sorted(name for name in then if then[name] != now[name])
    return f"changed files {changed[:3]}" if changed else ""


def _files(folder: Any) -> dict[str, dict]:
    """Every file below ``arrays``: its size, and its SHA-256 where the store (gs://) does not checksum by itself."""
    found = {}
    for entry in _below(folder / ARRAYS):
        card = found[str(entry)[len(str(folder)) + 1 :]] = {"size": entry.stat().length}
        if "://" not in str(folder):
            with open(entry, "rb") as file:
                card["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _below(folder: Any) -> Iterator[Any]:
    for entry in sorted(folder.iterdir()) if folder.exists() else ():
        if entry.is_dir():
            yield from _below(entry)
        else:
            yield entry
