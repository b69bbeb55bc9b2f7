"""Parquet tables as the hub's data sets have them: a picture column, and a talk in any layout of `conversations`."""

import collections
import dataclasses
import os
import threading
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from lvlm_jax.data.conversations import LAYOUTS, PICTURES, VIDEOS, picture_inside, table_fields, turns_of
from lvlm_jax.data.files import expand
from lvlm_jax.data.sources import Numbered, Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example

if TYPE_CHECKING:
    import pyarrow

_KEPT_BYTES = 128 * 2**20  # of row groups in a process; one that was let go is decoded again for a single record


class Table:
    """The rows of Parquet files by number; a row group is read when one of its rows is asked for.

    Args:
      path: as `files.expand` takes it.
      columns: names to read; those that the files lack are left out.
      rename: our name -> the files' own.

    Random reading costs one row group a record, so groups should be small (the hub writes 100 rows where there are
    pictures).

    Raises:
      DataError: a file that is no whole Parquet file, a renamed column that is not there, files that differ.
    """

    def __init__(self, path: str | os.PathLike, columns: Sequence[str], rename: dict[str, str] | None = None):
        self.files = expand(path, (".parquet",))
        self.crc, groups, rename = 0, [], rename or {}
        for number, file in enumerate(self.files):
            footer, schema, crc = _footer(file)
            for theirs in rename.values():
                if theirs not in schema.names:
                    raise DataError(f"{file}: no column {theirs!r}; there are {', '.join(schema.names)}")
            names = {ours: rename.get(ours, ours) for ours in columns}
            types = {ours: schema.field(name).type for ours, name in names.items() if name in schema.names}
            if number and types != self.types:
                other = sorted(k for k in types.keys() | self.types.keys() if types.get(k) != self.types.get(k))[0]
                raise DataError(f"{file}: column {other!r} differs from {self.files[0]}; one path must be one table")
            self.types, self.all = types, schema.names
            self.pictures = [field.name for field in schema if _holds_pictures(field.type)]
            self.names = {ours: names[ours] for ours in types}
            groups += [(number, group, footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]
            self.crc = zlib.crc32(crc.to_bytes(4, "big"), self.crc)
        self._groups = np.asarray(groups, np.int64).reshape(-1, 3)
        self._firsts = np.concatenate([[0], np.cumsum(self._groups[:, 2])])
        if not len(self):
            raise DataError(f"{path} holds no row")
        self._kept: collections.OrderedDict[int, pyarrow.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _kept=collections.OrderedDict(), _lock=threading.Lock())

    def origin(self, index: int) -> str:
        """``path: row n``, n counted in the file from 0."""
        file = self._groups[self._group(index), 0]
        first = self._firsts[int(np.searchsorted(self._groups[:, 0], file))]
        return f"{self.files[file]}: row {index - first}"

    def read(self, index: int) -> dict[str, Any]:
        """Row `index`, by our names; a null is left out."""
        group = self._group(index)
        row = self._read_group(group).slice(index - int(self._firsts[group]), 1).to_pylist()[0]
        return {ours: row[theirs] for ours, theirs in self.names.items() if row[theirs] is not None}

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def _read_group(self, group: int) -> "pyarrow.Table":
        import pyarrow
        import pyarrow.parquet

        with self._lock:  # threads of a loader ask for neighbours: one of them reads
            if group not in self._kept:
                file, number = self.files[self._groups[group, 0]], int(self._groups[group, 1])
                try:
                    with file.open("rb") as opened:
                        table = pyarrow.parquet.ParquetFile(opened).read_row_group(number, [*self.names.values()])
                except (pyarrow.ArrowException, OSError) as error:
                    raise DataError(f"{file}: row group {number} is damaged ({error}); fetch the file again") from error
                self._kept[group] = table
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]


def _footer(file: epath.Path) -> tuple[Any, Any, int]:
    """(metadata, schema, checksum of the footer, which holds the statistics and place of every column chunk)."""
    import pyarrow
    import pyarrow.parquet

    try:
        with file.open("rb") as opened:
            parquet = pyarrow.parquet.ParquetFile(opened)
            opened.seek(-8, os.SEEK_END)
            size = int.from_bytes(opened.read(4), "little")
            opened.seek(-8 - size, os.SEEK_END)
            return parquet.metadata, parquet.schema_arrow, zlib.crc32(opened.read(size))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: not a whole Parquet file ({' '.join(str(error).split())[:120]}); it is cut short, or another "
            "format: fetch it again"
        ) from None


class Parquet(Numbered):
    """Conversations of a `Table`: pictures in ``image`` or ``images``, the talk in one of `conversations.LAYOUTS`.

    Args:
      path, rename: as for `Table`.
      images: folder of pictures that the table names by path; default the first file's own.

    Raises:
      DataError: no column that holds a talk, a column of the wrong type, and what `Table` refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        images: str | os.PathLike | None = None,
        rename: dict[str, str] | None = None,
    ):
        self._table = Table(path, table_fields(rename or {}), rename)
        self._images = epath.Path(images) if images is not None else self._table.files[0].parent
        if not self._table.types.keys() & LAYOUTS.keys():
            raise DataError(
                f"{self._table.files[0]}: none of the columns {', '.join(LAYOUTS)}; there are "
                f"{', '.join(self._table.all)}; say which is which with rename, like 'caption=TEXT'"
            )
        for name, type_ in self._table.types.items():
            check_column(self._table, name, type_)
        if not self._table.types.keys() & {*PICTURES, *VIDEOS} and (unread := self._table.pictures):
            raise DataError(
                f"{self._table.files[0]}: column {unread[0]!r} holds pictures, but no column is read as 'image' or "
                f"'images'; add image={unread[0]} to rename, or drop the column"
            )

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        table = self._table
        return (
            f"Parquet({str(table.files[0])!r}, files={len(table.files)}, rows={len(table)}, columns={table.names}, "
            f"images={str(self._images)!r}, crc={table.crc:08x})"
        )

    def origin(self, index: int) -> str:
        """``path: row n``."""
        return self._table.origin(index)

    def _example(self, index: int) -> Example:
        record, origin = self._table.read(index), self.origin(index)
        turns = turns_of(record, picture_inside(self._images), origin)
        return Example(turns=turns, id=str(record.get("id", index)), origin=origin)


_FILES = "pictures or videos: structs {bytes, path}, binary or text (paths), alone or in a list"


def _holds_pictures(type_: "pyarrow.DataType") -> bool:
    """Whether a column is what the hub writes for pictures: structs of bytes and path, or lists of them."""
    import pyarrow.types as kinds

    inner = type_.value_type if kinds.is_list(type_) or kinds.is_large_list(type_) else type_
    return kinds.is_struct(inner) and {"bytes", "path"} <= {field.name for field in inner}


_TURNS = {
    "conversations": ("from", "value"),
    "messages": ("role", "content"),
    "texts": ("user", "assistant"),
    "QA": ("q", "a"),
}


def check_column(table: Table, name: str, type_: "pyarrow.DataType", wanted: str = "") -> None:
    """Refuses a column that cannot hold what its name says, or, with `wanted`, one that is not that list of texts."""
    import pyarrow.types as kinds

    is_list = kinds.is_list(type_) or kinds.is_large_list(type_) or kinds.is_fixed_size_list(type_)
    inner = type_.value_type if is_list else type_
    names = {field.name for field in inner} if kinds.is_struct(inner) else set()
    text = kinds.is_string(inner) or kinds.is_large_string(inner)
    good = True
    if wanted:
        good = is_list and text
    elif name in (*PICTURES, *VIDEOS):
        good = text or kinds.is_binary(inner) or kinds.is_large_binary(inner) or bool(names & {"bytes", "path"})
        wanted = _FILES
    elif name in _TURNS:
        good, wanted = is_list and names >= {*_TURNS[name]}, f"a list of structs {{{', '.join(_TURNS[name])}}}"
    elif name in ("answer", "answers"):
        good, wanted = text, "text or a list of texts"
    elif name in LAYOUTS:
        good, wanted = text and not is_list, "text"
    if not good:
        raise DataError(
            f"{table.files[0]}: column {table.names[name]!r} has type {type_}, but {name!r} must be {wanted}; cast it, "
            "or name the right column with rename"
        )


def renames(pairs: Sequence[str]) -> dict[str, str]:
    """``our_name=their_name`` words as a dict."""
    for pair in pairs:
        if pair.count("=") != 1 or "" in pair.split("="):
            raise DataError(f"rename: {pair!r} must read our_name=their_name, like 'caption=TEXT'")
    found = dict(pair.split("=") for pair in pairs)
    if unknown := sorted(found.keys() - table_fields({})):
        raise DataError(f"rename: {unknown[0]!r} is no field of a record; the fields are {', '.join(table_fields({}))}")
    if len(found) < len(pairs):
        raise DataError(f"rename: a field is named twice in {', '.join(pairs)}; each may stand once")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """The recipe's fields of `Parquet`. rename: ``our_name=their_name``, for columns called otherwise."""

    path: str
    images: str = ""
    rename: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        renames(self.rename)

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return Parquet(self.path, images=self.images or None, rename=renames(self.rename))
