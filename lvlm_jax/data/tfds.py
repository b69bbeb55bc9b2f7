"""TFDS sets in array_record files, read by number without TensorFlow; TFRecord sets are converted once.

Source: tensorflow_datasets, `ReadOnlyBuilder.as_data_source`; the TFRecord format, tensorflow.org/tutorials/load_data.
"""

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from lvlm_jax.data.conversations import LAYOUTS, picture_inside, table_fields, turns_of
from lvlm_jax.data.parquet import renames
from lvlm_jax.data.sources import Numbered, Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example
from lvlm_jax.progress import bar

INFO, FEATURES = "dataset_info.json", "features.json"


class Tfds(Numbered):
    """One split of a prepared TFDS set: the same fields as a `Parquet` table, as TFDS features.

    Args:
      path: the folder that holds ``dataset_info.json``.
      split: TFDS's own words: ``train``, ``train[:10%]``.
      rename: our name -> the set's own.

    Pictures stay encoded; class labels become their names.

    Raises:
      DataError: no such set or split, files in another format than array_record, no feature that holds a talk.
    """

    def __init__(self, path: str | os.PathLike, split: str = "train", rename: dict[str, str] | None = None):
        self._path, self._split = epath.Path(path).expanduser(), split
        kind = _info(self._path).get("fileFormat", "tfrecord")
        if kind != "array_record":
            raise DataError(
                f"{self._path}: its files are in format {kind!r}, which cannot be read by number; convert it once: "
                f"lvlm data convert-tfrecord {self._path} OUT"
            )
        self._crc = zlib.crc32((self._path / INFO).read_bytes() + (self._path / FEATURES).read_bytes())
        features = self._open()
        names = {ours: (rename or {}).get(ours, ours) for ours in table_fields(rename or {})}
        for theirs in (rename or {}).values():
            if theirs not in features:
                raise DataError(f"{self._path}: no feature {theirs!r}; there are {', '.join(features)}")
        self._names = {ours: theirs for ours, theirs in names.items() if theirs in features}
        if not self._names.keys() & LAYOUTS.keys():
            raise DataError(
                f"{self._path}: none of the features {', '.join(LAYOUTS)}; there are {', '.join(features)}; say which "
                "is which with rename, like 'answer=label'"
            )

    def _open(self) -> Any:
        """Opens the split; returns the features."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(self._path)
            features = builder.info.features
            skip = {name: tfds.decode.SkipDecoding() for name, kind in features.items() if _is_picture(kind)}
            self._data = builder.as_data_source(split=self._split, decoders=skip)
        except (ValueError, KeyError, OSError, AssertionError) as error:
            raise DataError(f"{self._path}: split {self._split!r}: {' '.join(str(error).split())[:240]}") from None
        self._features = features
        return features

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return (
            f"Tfds({str(self._path)!r}, split={self._split!r}, records={len(self)}, features={self._names}, "
            f"crc={self._crc:08x})"
        )

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_data", "_features")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def origin(self, index: int) -> str:
        """``path: split[n]``."""
        return f"{self._path}: {self._split}[{index}]"

    def _example(self, index: int) -> Example:
        origin = self.origin(index)
        try:
            values = self._data[index]
        except Exception as error:  # array_record and protobuf raise errors of their own
            raise DataError(
                f"{origin}: cannot be read ({type(error).__name__}: {error}); fetch the file again"
            ) from error
        record = {ours: _plain(self._features[theirs], values[theirs], origin) for ours, theirs in self._names.items()}
        turns = turns_of(record, picture_inside(self._path), origin)
        return Example(turns=turns, id=str(record.get("id", index)), origin=origin)


def _is_picture(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return type(inner).__name__ == "Image"


def _plain(feature: Any, value: Any, origin: str) -> Any:
    """A feature's value as a JSON record would hold it; pictures stay bytes."""
    if _is_picture(feature):
        return list(value) if hasattr(feature, "feature") else value
    if hasattr(feature, "feature"):  # a sequence; one of dicts comes as a dict of columns
        if isinstance(value, dict):
            columns = {name: _plain_list(feature.feature[name], column, origin) for name, column in value.items()}
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return _plain_list(feature.feature, value, origin)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: not UTF-8 text (byte {error.start}); write the set again") from None
    return feature.int2str(int(value)) if hasattr(feature, "int2str") else value


def _plain_list(feature: Any, values: Any, origin: str) -> list[Any]:
    return [_plain(feature, value, origin) for value in values]


def _info(path: epath.Path) -> dict[str, Any]:
    for name in (INFO, FEATURES):
        if not (path / name).is_file():
            raise DataError(
                f"{path}: no {name}; give the folder of one prepared version, like tensorflow_datasets/name/1.0.0"
            )
    try:
        return json.loads((path / INFO).read_text())
    except ValueError as error:
        raise DataError(f"{path / INFO}: broken JSON ({error}); copy the set again") from None


def convert_tfrecord(path: str | os.PathLike, out: str | os.PathLike, progress: bool = True) -> int:
    """Writes a TFDS set of TFRecord files as array_record files under `out`; returns how many records.

    The records are the same bytes in the same order, so nothing is decoded and TensorFlow is not needed. Both checksums
    of each are verified.

    Raises:
      DataError: no prepared set, one in another format, an existing `out`, a damaged file, a file with more or fewer
        records than the set's own list says.
      ImportError: google-crc32c, which checks the records, is absent.
    """
    from array_record.python import array_record_module

    path, out = epath.Path(path).expanduser(), epath.Path(out).expanduser()
    info = _info(path)
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise DataError(f"{path}: its files are in format {info['fileFormat']!r} already; only tfrecord is converted")
    if out.exists():
        raise DataError(f"{out}: there is something already; give a new folder")
    checksum = _checksum()
    files = [(split, *file) for split in info.get("splits", []) for file in _files(path, info, split)]
    part = out.parent / f"{out.name}.part"
    part.mkdir(parents=True, exist_ok=True)
    total = 0
    with bar(len(files), "converting files", show=progress) as drawn:
        for split, file, wanted in files:
            writer = array_record_module.ArrayRecordWriter(
                str(part / file.name.replace(".tfrecord", ".array_record")), "group_size:1"
            )
            count = 0
            for record in records(file, checksum):
                writer.write(record)
                count += 1
            writer.close()
            if count != wanted:
                raise DataError(f"{file}: {count} records, but {INFO} lists {wanted} for split {split['name']!r}")
            total += count
            drawn.update()
    for extra in path.iterdir():
        if extra.is_file() and ".tfrecord" not in extra.name:
            extra.copy(part / extra.name, overwrite=True)
    changed = {**info, "fileFormat": "array_record"}
    (part / INFO).write_text(json.dumps(changed, indent=2))
    part.rename(out)
    return total


def _files(path: epath.Path, info: dict[str, Any], split: dict[str, Any]) -> Iterator[tuple[epath.Path, int]]:
    """(file, records in it) of a split."""
    lengths = [int(n) for n in split["shardLengths"]]
    for number, wanted in enumerate(lengths):
        name = f"{info['name']}-{split['name']}.tfrecord-{number:05d}-of-{len(lengths):05d}"
        if not (path / name).is_file():
            raise DataError(f"{path}: file {name} of split {split['name']!r} is missing; copy the set again")
        yield path / name, wanted


def _checksum() -> Any:
    try:
        import google_crc32c
    except ImportError:
        raise ImportError("the records' checksums need google-crc32c; pip install 'lvlm-jax[tfrecord]'") from None
    return google_crc32c.value


def records(file: epath.Path, checksum: Any) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, the bytes, their checksum (masked CRC-32C).

    Raises DataError for one that ends in the middle of a record, or whose checksum differs.
    """
    with file.open("rb") as opened:
        number = 0
        while head := opened.read(12):
            length, crc = struct.unpack("<QI", head) if len(head) == 12 else (0, 0)
            if len(head) == 12 and crc != _masked(checksum(head[:8])):
                raise DataError(
                    f"{file}: record {number}: the checksum of its length differs; not a TFRecord, or damaged"
                )
            body = opened.read(length + 4)
            if len(head) < 12 or len(body) < length + 4:
                raise DataError(f"{file}: ends in the middle of record {number}; copy or download it again")
            if struct.unpack("<I", body[length:])[0] != _masked(checksum(body[:length])):
                raise DataError(f"{file}: record {number}: its checksum differs; the file is damaged, fetch it again")
            yield body[:length]
            number += 1


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSplit:
    """The recipe's fields of `Tfds`. rename: ``our_name=their_name``, for features called otherwise."""

    path: str
    split: str = "train"
    rename: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        renames(self.rename)

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return Tfds(self.path, self.split, renames(self.rename))
