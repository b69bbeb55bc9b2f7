"""Which files a recipe's path means: one file, a folder, a glob or braces, here or on a remote disk (gs://, s3://)."""

import itertools
import os
import re
import sys
import uuid
from collections.abc import Sequence

import numpy as np
from etils import epath

from lvlm_jax.processing.encode import DataError

_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
PATTERN = "*?[{"
"""What makes a path a pattern of names."""
_GLOB = re.compile(r"[*?\[]")


def expand(path: str | os.PathLike, suffixes: Sequence[str]) -> list[epath.Path]:
    """The files of `path`, in order.

    A file is itself; a folder is its files with one of `suffixes`, by name; ``*``, ``?`` and ``[...]`` match names;
    ``{00000..00010}`` counts, keeping leading zeros, and ``{a,b}`` lists.

    Raises:
      DataError: nothing there, nothing that matches, a missing file of a brace pattern.
    """
    found = [file for text in braces(os.fspath(path)) for file in _files(text, suffixes)]
    seen = set()
    for file in found:
        if file in seen:
            raise DataError(f"{path}: names {file} twice; each file may stand once")
        seen.add(file)
    return found


def part_of(file: epath.Path) -> epath.Path:
    """A name beside `file` that no other process takes, for what is written whole and then renamed.

    Hosts may share a disk, and containers number their processes alike, so the name is drawn at random.
    """
    return file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.part")


def write_whole(file: epath.Path, data: bytes) -> None:
    """Writes a file, its folder too, so that no reader ever sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(file)
    part.write_bytes(data)
    part.replace(file)


def read_arrays(file: epath.Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Arrays of an npz file, by its own checksums; None where there is none or it is damaged, which is said."""
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:  # zip, zlib, numpy and the file system each have their own
        print(f"{file} is damaged ({error!r}) and is made again", file=sys.stderr, flush=True)
        return None


def braces(text: str) -> list[str]:
    """``a{08..10}.tar`` as ``a08.tar``, ``a09.tar``, ``a10.tar``; several braces multiply."""
    pieces = _BRACE.split(text)
    return [
        "".join(choice) for choice in itertools.product(*(_choices(i, piece, text) for i, piece in enumerate(pieces)))
    ]


def _choices(number: int, piece: str, text: str) -> list[str]:
    if number % 2 == 0:
        return [piece]
    if match := _RANGE.fullmatch(piece):
        first, last = match.groups()
        if int(last) < int(first):
            raise DataError(f"{text}: {{{piece}}} counts down; write the smaller number first")
        return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    if "," in piece:
        return piece.split(",")
    raise DataError(f"{text}: {{{piece}}} is neither a count like {{00000..00010}} nor a list like {{a,b}}")


def _files(text: str, suffixes: Sequence[str]) -> list[epath.Path]:
    wanted = " or ".join(suffixes)
    if match := _GLOB.search(text):
        head, _, _ = text[: match.start()].rpartition("/")
        root = epath.Path(head or ("/" if text.startswith("/") else "."))
        found = sorted(root.glob(text[len(head) :].lstrip("/")), key=str)
        if not found:
            raise DataError(f"{text}: no file matches; check the folder and the pattern ({wanted} files are read)")
        return found
    path = epath.Path(text).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted((f for f in path.iterdir() if f.name.lower().endswith(tuple(suffixes))), key=str)
        if not found:
            raise DataError(f"{path} is a folder without a {wanted} file; give the file or a pattern like {path}/*")
        return found
    kind = f"{wanted} files" if wanted else "files"
    raise DataError(f"{path} does not exist; give the path of {kind} (a file, a folder, *, {{00000..00010}})")


def read_ranges(path: epath.Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes at each (offset, size) of a file, opened once; DataError when it has become shorter."""
    out = []
    with path.open("rb") as file:
        for start, size in ranges:
            file.seek(start)
            out.append(file.read(size))
            if len(out[-1]) != size:
                end = start + len(out[-1])
                raise DataError(f"{path}: ends at byte {end}, the index expects {start + size}; it has changed")
    return out
