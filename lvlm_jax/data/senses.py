"""What named senses need of data: segments of a record, room in a group, and their arrays of a batch."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Encoded, Features, Image, SenseRows
from lvlm_jax.processing.senses import SenseSpec, read
from lvlm_jax.shapes import Int

FEATURE_FILES = (".npy", ".npz")
"""Suffixes of files that hold features; any other file of a named sense is a picture."""

# ---------------------------------------------------------------------------------------------------------------------
# Records


def sensed(record: Mapping[str, Any], find: Callable, origin: str) -> dict[str, list[Features | Image]]:
    """``{"senses": {name: source | [sources]}}`` of a record: what each named sense reads, in order.

    A source is the path of a .npy or .npz file of features, features written out as lists (``[[...], ...]``, as parquet
    holds them), or a picture as `find` takes it.

    Raises:
      DataError: another value; what `find` refuses.
    """
    found = record.get("senses")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise DataError(f"{origin}: 'senses' must be an object, name -> source, this is {type(found).__name__}")
    out = {}
    for name, value in found.items():
        several = isinstance(value, list) and not _is_array(value)
        sources = [] if value is None else value if several else [value]
        out[name] = [source(one, name, find, f"senses.{name}", origin) for one in sources]
    return {name: one for name, one in out.items() if one}


def source(value: Any, sense: str, find: Callable, field: str, origin: str, key: str = "") -> Features | Image:
    """What a field of a record holds for a named sense: features, or a picture."""
    if _is_array(value):
        return Features(np.asarray(value, np.float32), sense, key)
    found = find(value, field, origin)
    if isinstance(found.source, str) and found.source.endswith(FEATURE_FILES):
        return Features(found.source, sense, key, under=found.under)
    return dataclasses.replace(found, sense=sense)


def _is_array(value: Any) -> bool:
    """Whether a value is features written out: lists of numbers of one length."""
    if isinstance(value, np.ndarray):
        return True
    rows = isinstance(value, list) and value and all(isinstance(row, list | np.ndarray) for row in value)
    if not rows or len({len(row) for row in value}) > 1:
        return False
    return all(isinstance(x, int | float | np.number) for x in value[0])


# ---------------------------------------------------------------------------------------------------------------------
# Room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The vision rows that a group has room for: of pictures, and of each named sense.

    A plan packs by one number. Here it is the largest share that an example takes of any of the rooms, in units of
    which each room holds `total`: what fits by that number fits in every room. Without named senses it is the pictures.
    """

    pictures: int
    senses: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """What a group holds."""
        if not self.senses:
            return self.pictures
        return math.lcm(*(room for room in (self.pictures, *self.senses.values()) if room))

    def cost(self, pictures: Any, senses: Mapping[str, Any]) -> Any:
        """What examples take, from their vision rows: numbers, or arrays of them."""
        if not self.senses:
            return pictures
        rooms = {"": self.pictures, **self.senses}
        counts = {"": pictures, **senses}
        units = [np.asarray(count) * (self.total // rooms[name]) for name, count in counts.items() if rooms.get(name)]
        return np.max(np.broadcast_arrays(*units), axis=0) if units else 0 * np.asarray(pictures)

    def check(
        self, pictures: Int[np.ndarray, " n"], senses: Mapping[str, np.ndarray], origin: Callable[[int], str]
    ) -> None:
        """DataError for the first example that asks for more than a group has room for."""
        if not self.senses and not senses:
            return
        for name, counts in {"": pictures, **senses}.items():
            room = self.senses.get(name, 0) if name else self.pictures
            what = f"rows for sense {name!r}" if name else "pictures"
            field = f"data.senses.{name}" if name else "data.pictures"
            for index in np.flatnonzero(np.asarray(counts) > room)[:1]:
                raise DataError(
                    f"{origin(int(index))}: {counts[index]} {what}, but a group has room for {room} ({field} divided "
                    "among data.groups); raise it, or leave the record out"
                )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate_senses(
    rows: Sequence[Sequence[Encoded]],
    *,
    length: int,
    groups: int,
    specs: Mapping[str, SenseSpec],
    room: Mapping[str, int],
) -> dict[str, SenseRows] | None:
    """The named senses' part of a batch; None where there is room for none.

    Args:
      rows: as `collate.collate` takes them, which the examples' positions follow.
      room: vision rows of a group for each sense; one that is left out is not fed.

    Raises:
      DataError: a group that needs more rows of a sense than it has room for.
    """
    fed = {name: count for name, count in room.items() if count}
    if not fed:
        if any(encoded.placed for row in rows for encoded in row):
            raise DataError("a record names a sense, but the batch has room for none: give data.senses its rows")
        return None
    out = {name: _empty(specs[name], len(rows), length, groups, count) for name, count in fed.items()}
    taken: dict[tuple[int, str], int] = {}
    for row, start, encoded in _starts(rows):
        group = row // (len(rows) // groups)
        for one in encoded.placed:
            slot = taken.get((group, one.sense), 0)
            if slot + one.rows > fed.get(one.sense, 0):
                raise DataError(
                    f"group {group} needs more than {fed.get(one.sense, 0)} rows of sense {one.sense!r}; raise "
                    f"data.senses.{one.sense} or replan"
                )
            patches, positions = read(one, specs[one.sense])
            # A sequence that is shorter than a row, as a picture that keeps its shape: the rest is padding.
            at = (group, slice(slot, slot + one.rows), slice(patches.shape[1]))
            here = out[one.sense]
            here.patches[at], here.patch_positions[at], here.patch_segments[at] = patches, positions, 1
            tokens = slot * specs[one.sense].tokens + np.arange(one.size)
            here.index[row, start + one.start : start + one.stop] = tokens
            taken[group, one.sense] = slot + one.rows
    return out


def _starts(rows: Sequence[Sequence[Encoded]]) -> Iterator[tuple[int, int, Encoded]]:
    """(row, first position, example) of each example in turn."""
    for row, examples in enumerate(rows):
        at = 0
        for encoded in examples:
            yield row, at, encoded
            at += len(encoded.tokens)


def _empty(spec: SenseSpec, rows: int, length: int, groups: int, count: int) -> SenseRows:
    shape = (groups, count, spec.length)
    return SenseRows(
        index=np.full((rows, length), -1, np.int32),
        patches=np.zeros((*shape, spec.width), np.float32),
        patch_positions=np.zeros((*shape, 2), np.int32),
        patch_segments=np.zeros(shape, np.int32),
    )
