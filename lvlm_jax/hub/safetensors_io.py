"""A checkpoint folder of safetensors files, read one tensor at a time and written one shard at a time.

The safetensors library judges a file's header; the bytes of a tensor are then read from their place in the file, since
a memory map counts as resident memory and the library's numpy door knows bfloat16 only in its newest versions.
"""

import collections
import contextlib
import json
import mmap
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lvlm_jax.checkpoint import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The file format's names of number types."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2_000_000_000
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors$")


class _Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class ByKey(Mapping):
    """Tensors by key, one read at a time: what every format of checkpoint offers. Subclasses fill `_entries`."""

    _entries: Mapping[str, Any]

    def read(self, key: str) -> np.ndarray:
        """One tensor."""
        raise NotImplementedError

    def __getitem__(self, key: str) -> np.ndarray:
        """The same as `read`."""
        return self.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class TensorFolder(ByKey):
    """The tensors of a checkpoint folder by key; only headers are read until `read` is called.

    Takes one ``model.safetensors``, shards with an index, shards without one, or the file named by `only`.

    Raises:
      FileNotFoundError: no such folder.
      CheckpointError: no safetensors file, only pickle files, a damaged file, an absent shard, an index and files that
        disagree.
    """

    def __init__(self, path: str | Path, only: str | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder; a checkpoint is a folder of safetensors files")
        files, indexed = _files(self.path) if only is None else ([self.path / only], {})
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for key, entry in _header(file).items():
                if key in self._entries:
                    raise CheckpointError(
                        f"{self.path}: tensor {key!r} stands in {self._entries[key].file.name} and in {file.name}; "
                        "remove the files of the other checkpoint"
                    )
                self._entries[key] = entry
        for key, name in indexed.items():
            if key not in self._entries:
                raise CheckpointError(
                    f"{self.path / INDEX}: names tensor {key!r} in {name}, which does not hold it; index and files are "
                    "of different checkpoints: fetch both again"
                )

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._entries[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Number type of one tensor."""
        return self._entries[key].dtype

    def file(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._entries[key].file

    def read(self, key: str) -> np.ndarray:
        """One tensor, as it is in the file (bfloat16 stays bfloat16)."""
        file, dtype, shape, offset = self._entries[key]
        raw = read_bytes(file, offset, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, key)
        return raw.view(dtype).reshape(shape)


class Overlay(ByKey):
    """Tensors of several folders as one: a key is read from the first that has it.

    Args:
      layers: folders by falling precedence; the first one's `path` stands for all.
      rename: what a key is called here.
    """

    def __init__(self, layers: Iterable[TensorFolder], rename: Callable[[str], str] = str):
        layers = list(layers)
        self.path = layers[0].path
        self._entries = {rename(key): (layer, key) for layer in reversed(layers) for key in layer}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        layer, name = self._entries[key]
        return layer.shape(name)

    def dtype(self, key: str) -> np.dtype:
        """Number type of one tensor."""
        layer, name = self._entries[key]
        return layer.dtype(name)

    def file(self, key: str) -> Path:
        """The file that holds a tensor."""
        layer, name = self._entries[key]
        return layer.file(name)

    def read(self, key: str) -> np.ndarray:
        """One tensor, as it is in its file."""
        layer, name = self._entries[key]
        return layer.read(name)


def read_bytes(file: Path, offset: int, size: int, key: str) -> np.ndarray:
    """The bytes of one tensor, in room of their own (`pages`).

    Raises:
      CheckpointError: the file ends before.
    """
    raw, done = pages(size), 0
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while done < size:
            count = stream.readinto(memoryview(raw)[done:])
            if not count:
                raise CheckpointError(f"{file}: ends inside tensor {key!r}; it changed while it was read")
            done += count
    return raw


def pages(size: int) -> np.ndarray:
    """Room for `size` bytes that goes back to the system when it is dropped.

    The allocator would keep what hundreds of tensors of many sizes leave behind: an eighth of a checkpoint, measured.
    """
    return np.frombuffer(mmap.mmap(-1, size), np.uint8) if size >= 2**16 else np.empty(size, np.uint8)


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """(the files to read, the index's key -> file name or nothing), in the order in which the torch library looks."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE], {}
    if (folder / INDEX).exists():
        indexed = _index(folder / INDEX)
        absent = sorted(name for name in set(indexed.values()) if not (folder / name).exists())
        if absent:
            raise CheckpointError(
                f"{folder}: {INDEX} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there; "
                "the download or copy is not complete"
            )
        return [folder / name for name in sorted(set(indexed.values()))], indexed
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(_nothing(folder))
    parts = collections.defaultdict(set)
    for match in filter(None, (_PART.match(file.name) for file in files)):
        parts[match["stem"], int(match["total"])].add(int(match["number"]))
    for (stem, total), numbers in parts.items():
        if absent := sorted(set(range(1, total + 1)) - numbers):
            raise CheckpointError(
                f"{folder}: of the {total} files of {stem!r} number {', '.join(map(str, absent))} is not there; the "
                "download or copy is not complete"
            )
    return files, {}


def _index(path: Path) -> dict[str, str]:
    """The index's key -> file name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(found.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files ({error!r}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: {name!r} is not the name of a file beside the index")
    return found


def _nothing(folder: Path) -> str:
    """Why there is nothing to read."""
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES or f.name.endswith(".bin.index.json"))
    files = sorted(f for f in folder.glob("*.gguf"))
    if files:
        return f"{folder}: no .safetensors file there, but {files[0].name}; give that file itself: {files[0]}"
    if not pickles:
        return f"{folder}: no .safetensors file there; a checkpoint is config.json with model.safetensors or its shards"
    return (
        f"{folder}: {pickles[0]} is (or lists) a pickle, which runs code when it is read, so it is refused. Convert it "
        "where you trust it, with the torch library: AutoModel.from_pretrained(folder).save_pretrained(new_folder) "
        "(for LLaVA's original files torch.load(file, weights_only=True), then safetensors.torch.save_file), and give "
        "that folder"
    )


def _header(file: Path) -> dict[str, _Entry]:
    """Every tensor of one file, its header checked by the safetensors library."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise CheckpointError(f"{file}: a git-lfs pointer, not the file; run 'git lfs pull' in its repository")
        try:
            with safe_open(str(file), framework="np"):
                length = int.from_bytes(start, "little")
                header = json.loads(stream.read(length))
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{file}: not a whole safetensors file ({error}); it is {file.stat().st_size} bytes, cut short or "
                "damaged: fetch or copy it again"
            ) from error
    header.pop("__metadata__", None)
    unknown = {info["dtype"] for info in header.values()} - DTYPES.keys()
    if unknown:
        raise CheckpointError(f"{file}: number types {sorted(unknown)} are not read here; known: {', '.join(DTYPES)}")
    return {
        key: _Entry(file, DTYPES[info["dtype"]], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
        for key, info in header.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that appears under its name only when all is written; on an error nothing is left.

    Raises:
      FileExistsError: something is there already and `overwrite` is False.
    """
    path = Path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: there is something already; give a new folder, or ask to overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = secrets.token_hex(4)
    partial = path.parent / f".{path.name}.{unique}.partial"
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = path.parent / f".{path.name}.{unique}.old"
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_folder(
    path: str | Path,
    tensors: Iterable[tuple[str, np.ndarray | Callable[[], np.ndarray]]],
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes the weights of a checkpoint folder whole or not at all; arguments as `write_tensors`."""
    with new_folder(path, overwrite) as folder:
        write_tensors(folder, tensors, max_shard_bytes)


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray | Callable[[], np.ndarray]]],
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes ``model.safetensors``, or shards and their index, holding no more than one shard in memory.

    Args:
      tensors: (key, array or a function that makes it), taken one after the other.
      max_shard_bytes: a shard closes before it grows beyond this; a larger tensor gets a shard of its own.
    """
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    total = size = 0
    part = lambda i: folder / f"part-{i}.safetensors"  # noqa: E731
    for key, value in tensors:
        array = np.asarray(value() if callable(value) else value)
        if waiting and size + array.nbytes > max_shard_bytes:
            write_file(part(len(shards)), waiting)
            shards.append(list(waiting))
            waiting, size = {}, 0
        if key in seen:
            raise ValueError(f"tensor {key!r} is given twice")
        seen.add(key)
        waiting[key] = array
        size += array.nbytes
        total += array.nbytes
    write_file(part(len(shards)), waiting)
    shards.append(list(waiting))
    if len(shards) == 1:
        part(0).rename(folder / SINGLE)
        return
    weight_map = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        part(i).rename(folder / name)
        weight_map.update(dict.fromkeys(keys, name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file. Wide number types come first, so that each tensor begins at a multiple of its width."""
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in order:
        array = tensors[key]
        if array.dtype not in _NAMES:
            raise ValueError(f"tensor {key!r}: safetensors has no number type for {array.dtype}")
        span = [offset, offset + array.nbytes]
        header[key] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            # A transposed kernel is written in rows of torch's order: the only copy, one tensor at a time.
            stream.write(np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8))
