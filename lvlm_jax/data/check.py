"""Every bad record of a source, with file, line and reason, before any device is touched."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from lvlm_jax.data.sources import Source
from lvlm_jax.processing.image import ImageError, ImageSpec
from lvlm_jax.processing.picture import no_such_file
from lvlm_jax.processing.schema import Clip, Encoded, Example, Image
from lvlm_jax.processing.video import pictures as opened
from lvlm_jax.processing.video import read_rows
from lvlm_jax.progress import bar as progress_bar
from lvlm_jax.shapes import Int

Encode = Callable[[Example], Encoded]
_CHUNK = 512  # records in flight, so that a long source is not queued whole


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that cannot be used: its number, where it stands (``train.json:12``), and why."""

    index: int
    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found; `str(report)` is the page a person reads.

    lengths int[n] and pictures int[n] are those of the good records, in order; a video's frames count as pictures, and
    videos says how many videos there are. unknown is the share of the tokens that stand for words the tokenizer does
    not know; None where nobody asked.
    """

    source: str
    total: int
    bad: tuple[Bad, ...]
    lengths: Int[np.ndarray, " n"]
    pictures: Int[np.ndarray, " n"]
    decoded: bool
    unknown: float | None = None
    videos: int = 0

    @property
    def ok(self) -> bool:
        """Whether every record can be used."""
        return not self.bad

    def __str__(self) -> str:
        lines = [self.source]
        lines += [f"  {bad}" for bad in self.bad]
        seen = "decoded" if self.decoded else "not opened"
        of_videos = f"with the frames of {self.videos:,} video(s) " if self.videos else ""
        lines.append(
            f"{self.total:,} records: {len(self.lengths):,} good, {len(self.bad):,} bad; "
            f"{int(self.pictures.sum()):,} pictures {of_videos}({seen})"
        )
        if self.unknown:
            lines.append(
                f"{self.unknown:.1%} of the tokens stand for words that this tokenizer does not know; is --config, or "
                "--tokenizer, the one of the model that you will train?"
            )
        if len(self.lengths):
            lines += ["tokens a record:", *histogram(self.lengths)]
        return "\n".join(lines)


def check(
    source: Source,
    encode: Encode,
    images: bool = True,
    limit: int | None = None,
    progress: bool = True,
    spec: ImageSpec | None = None,
    unknown_id: int | None = None,
) -> Report:
    """Read, encode and (with `images`) fully decode the first `limit` records, and report every bad one.

    With `spec` each picture is also fitted as the run will do it, under that spec's limit of pixels. `unknown_id` is
    the token that stands for unknown words, to count them.
    """
    total = len(source) if limit is None else min(limit, len(source))
    bad, lengths, pictures, unknown, videos = [], [], [], 0, 0
    for found in inspect_all(source, encode, images=images, numbers=range(total), progress=progress, spec=spec):
        if isinstance(found, Bad):
            bad.append(found)
        else:
            lengths.append(len(found.tokens))
            clips = [image.source for image in found.images if isinstance(image.source, Clip)]
            pictures.append(len(found.images) + sum(len(clip.indices) - 1 for clip in clips))
            videos += len(clips)
            unknown += int((found.tokens == unknown_id).sum()) if unknown_id is not None else 0
    return Report(
        source=repr(source),
        total=total,
        bad=tuple(bad),
        lengths=np.asarray(lengths, np.int64),
        pictures=np.asarray(pictures, np.int64),
        decoded=images,
        unknown=None if unknown_id is None else unknown / max(1, sum(lengths)),
        videos=videos,
    )


def inspect_all(
    source: Source,
    encode: Encode,
    *,
    images: bool | Literal["present"],
    numbers: Sequence[int],
    progress: bool,
    spec: ImageSpec | None = None,
) -> Iterator[Encoded | Bad]:
    """`inspect` of records by number, in order, with a progress bar; pictures are decoded by threads."""
    seen: set[str] = set()  # a picture that many records share is decoded once

    def one(index: int) -> Encoded | Bad:
        return inspect(source, encode, index, images=images, spec=spec, seen=seen)

    with progress_bar(len(numbers), "reading records", show=progress) as bar:
        if images is not True:
            for index in numbers:
                yield one(index)
                bar.update()
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(numbers), _CHUNK):
                for found in pool.map(one, numbers[start : start + _CHUNK]):
                    yield found
                    bar.update()


def inspect(
    source: Source,
    encode: Encode,
    index: int,
    *,
    images: bool | Literal["present"],
    spec: ImageSpec | None = None,
    seen: set[str] | None = None,
) -> Encoded | Bad:
    """One record encoded, or why it cannot be used. Mistakes in code (TypeError and the like) are raised.

    images: whether its pictures are decoded too; "present" only looks whether the files of this machine are there.
    """
    origin = origin_of(source, index)
    try:
        encoded = encode(source[index])
        sensed = [one.segment for one in encoded.placed if isinstance(one.segment, Image)]
        for image in (*encoded.images, *sensed) if images == "present" else ():
            if isinstance(image.source, str) and "://" not in image.source and not os.path.exists(image.source):
                raise ImageError(no_such_file(image.source, image.under))
        for image in (*encoded.images, *sensed) if images is True else ():
            what = image.source  # a file, or some frames of one
            if isinstance(what, Clip) and isinstance(what.video.source, str):
                what = f"{what.video.source} {what.indices}"
            if seen is None or not isinstance(what, str) or what not in seen:
                _decode(image, None if image.sense else spec)
            if seen is not None and isinstance(what, str):
                seen.add(what)
    except (ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        return Bad(index, origin, reason.removeprefix(origin).lstrip(": "))
    return encoded


def _decode(image: Image, spec: ImageSpec | None) -> None:
    if spec is None:
        for _ in opened(image):
            pass
    else:
        read_rows(image, spec)


def origin_of(source: Any, index: int) -> str:
    """Where record `index` stands; sources without `origin` get their repr and the number."""
    return source.origin(index) if hasattr(source, "origin") else f"{source!r}[{index}]"


def histogram(values: Int[np.ndarray, " n"], bins: int = 10, width: int = 40) -> list[str]:
    """A text histogram, one line a bin: ``range  count  bar``."""
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, bins + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    digits, marks = len(str(high)), np.round(width * counts / counts.max()).astype(int)
    return [
        f"  {start:>{digits}} to {stop - 1:>{digits}}  {count:>9,}  {'#' * mark}".rstrip()
        for start, stop, count, mark in zip(edges[:-1], edges[1:], counts, marks)
    ]
