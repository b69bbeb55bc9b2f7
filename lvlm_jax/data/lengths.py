"""How many tokens and pictures each record has: read once, kept on disk, and all that a packing plan is made from."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from lvlm_jax.data.check import Bad, Encode, inspect_all
from lvlm_jax.data.files import read_arrays, write_whole
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.shapes import Int

_FIELDS = ("lengths", "pictures", "bad")  # of the kept file
_SENSE = "sense_"  # before the name of a named sense there
_BLOCK = 512  # records that one host reads in a row


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a plan is made from: lengths int64[n], pictures int64[n] (both 0 for a bad record), and the bad records.

    `pictures` counts vision rows: one a picture, and one a tile where pictures are cut into tiles. `senses` counts
    those of each named sense that some record has.
    """

    lengths: Int[np.ndarray, " n"]
    pictures: Int[np.ndarray, " n"]
    bad: tuple[Bad, ...] = ()
    senses: dict[str, Int[np.ndarray, " n"]] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.lengths, self.pictures, self.bad))


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a run, which read the records together.

    exchange: this host's bytes -> every host's, in the order of hosts; all hosts call it, and as often.
    """

    host: int
    hosts: int
    exchange: Callable[[bytes], list[bytes]]


def measure_lengths(
    source: Source,
    encode: Encode,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
    on_bad: str = "raise",
    images: bool | None = None,
    spec: ImageSpec | None = None,
    hosts: Hosts | None = None,
) -> Measured:
    """Tokens and pictures of every record, read once and kept in the folder `cache`: ``lengths, pictures, bad = ...``.

    `on_bad` is decided here, before the plan is made: "raise" stops at the first bad record, "skip" gives it length 0,
    which leaves it out of the plan. `images` decodes every picture too (with `spec`, as the run will); the default does
    so under "skip", where a picture that turns out broken later would stop the run. With `hosts` each reads its share
    of the records, or takes what another host has in its cache; all return, or raise, the same.

    Raises:
      DataError: a bad record under "raise"; every record bad.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r}; valid: 'raise', 'skip'")
    images = on_bad == "skip" if images is None else images
    file = None
    if cache is not None:
        file = epath.Path(cache) / f"lengths-{fingerprint(source, encode, images and (spec or True))}.npz"
    found = file.read_bytes() if file is not None and read_arrays(file, _FIELDS) is not None else b""
    kept = found
    if hosts is not None:
        kept = next((other for other in hosts.exchange(found) if other), b"")
    measured = _unpacked(kept) if kept else None
    if measured is None:
        blocks = _blocks(len(source), hosts)
        stop = on_bad == "raise"
        measured = _measure(source, encode, blocks, images=images, spec=spec, progress=progress, stop=stop)
        if hosts is not None:
            measured = _joined([_unpacked(part) for part in hosts.exchange(_packed(measured))])
    if measured.bad and on_bad == "raise":
        raise DataError(f"{measured.bad[0]}; mend the record, or leave such records out with on_bad='skip'")
    if file is not None and not found:
        write_whole(file, _packed(measured))
    if len(measured.bad) == len(source):
        raise DataError(f"all {len(source)} records are bad; the first: {measured.bad[0]}")
    return measured


def _blocks(total: int, hosts: Hosts | None) -> list[int]:
    """The records that this host reads: every so many-th block of them, since neighbours share files and pictures."""
    if hosts is None:
        return list(range(total))
    mine = range(hosts.host * _BLOCK, total, hosts.hosts * _BLOCK)
    return [index for start in mine for index in range(start, min(start + _BLOCK, total))]


def _measure(
    source: Source,
    encode: Encode,
    numbers: list[int],
    *,
    images: bool,
    spec: ImageSpec | None,
    progress: bool,
    stop: bool,
) -> Measured:
    """Some records measured, all others 0; with `stop` the first bad one is the last."""
    lengths, pictures, bad = np.zeros(len(source), np.int64), np.zeros(len(source), np.int64), []
    senses: dict[str, np.ndarray] = {}
    records = inspect_all(source, encode, images=images or "present", numbers=numbers, progress=progress, spec=spec)
    for index, found in zip(numbers, records, strict=True):
        if isinstance(found, Bad):
            bad.append(found)
            if stop:
                break
        else:
            lengths[index], pictures[index] = len(found.tokens), found.vision_rows
            for name, count in found.sense_rows.items():
                senses.setdefault(name, np.zeros(len(source), np.int64))[index] = count
    return Measured(lengths, pictures, tuple(bad), senses)


def _joined(parts: list[Measured]) -> Measured:
    """What the hosts measured, each its own records."""
    bad = sorted((entry for part in parts for entry in part.bad), key=lambda entry: entry.index)
    names = dict.fromkeys(name for part in parts for name in part.senses)
    senses = {name: sum(part.senses.get(name, 0) for part in parts) for name in names}
    return Measured(sum(part.lengths for part in parts), sum(part.pictures for part in parts), tuple(bad), senses)


def _packed(measured: Measured) -> bytes:
    out = io.BytesIO()
    bad = json.dumps([dataclasses.astuple(entry) for entry in measured.bad])
    senses = {f"{_SENSE}{name}": counts for name, counts in measured.senses.items()}
    np.savez_compressed(out, lengths=measured.lengths, pictures=measured.pictures, bad=np.array(bad), **senses)
    return out.getvalue()


def _unpacked(data: bytes) -> Measured:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        bad = tuple(Bad(*entry) for entry in json.loads(str(arrays["bad"])))
        senses = {name.removeprefix(_SENSE): arrays[name] for name in arrays if name.startswith(_SENSE)}
        return Measured(arrays["lengths"], arrays["pictures"], bad, senses)


def fingerprint(source: Source, encode: Encode, images: ImageSpec | bool = False) -> str:
    """A short hash of everything that lengths follow from: the source's content, the template, the tokenizer.

    `images` says whether, and how, pictures were decoded, which the list of bad records follows from.

    Raises ValueError for a source or an argument whose repr carries a memory address: it would not be found again.
    """
    return hashlib.sha256("\n".join([repr(source), _describe(encode), str(images)]).encode()).hexdigest()[:20]


def _describe(value: Any) -> str:
    """A text that is equal in every process for an equal value."""
    if hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        bound = [*map(_describe, value.args), *(f"{k}={_describe(v)}" for k, v in sorted(value.keywords.items()))]
        return f"{_describe(value.func)}({', '.join(bound)})"
    if hasattr(value, "get_vocab"):
        vocabulary = json.dumps(sorted(value.get_vocab().items())) + str(sorted(value.all_special_tokens))
        return f"tokenizer {hashlib.sha256(vocabulary.encode()).hexdigest()}"
    if hasattr(value, "hf"):
        return _describe(value.hf)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{f.name}={_describe(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, value))})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    if " at 0x" in text:
        raise ValueError(f"{text} has no repr that names its content, so lengths cannot be cached; give it a __repr__")
    return text
