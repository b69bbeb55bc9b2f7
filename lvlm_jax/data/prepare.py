"""The public LLaVA-1.5 sets as their authors lay them out on disk: is everything there, and what is in it.

Nothing is downloaded. Source: haotian-liu/LLaVA, README, "Train" (folders), docs/Data.md (counts).
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np
from etils import epath

from lvlm_jax.data.check import Bad, Encode, histogram
from lvlm_jax.data.sources import LlavaJson
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Text
from lvlm_jax.progress import bar
from lvlm_jax.shapes import Int

TEXT = "text only"
_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One public set. images: where picture paths start, under the root. folders: what must lie there.

    parts: first folder of a picture's path -> records of the published file; `TEXT` counts those without a picture.
    """

    file: str
    images: str
    folders: tuple[str, ...]
    parts: dict[str, int]
    origin: str


LAYOUTS: dict[str, Layout] = {
    "558k": Layout(
        file="blip_laion_cc_sbu_558k.json",
        images="images",
        folders=("",),
        parts={},
        origin="liuhaotian/LLaVA-Pretrain on the hub: blip_laion_cc_sbu_558k.json, and images.zip unpacked to images/",
    ),
    "665k": Layout(
        file="llava_v1_5_mix665k.json",
        images="",
        folders=(
            "coco/train2017",
            "gqa/images",
            "ocr_vqa/images",
            "textvqa/train_images",
            "vg/VG_100K",
            "vg/VG_100K_2",
        ),
        parts={"coco": 364_100, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 86_417, TEXT: 40_688},
        origin="liuhaotian/LLaVA-Instruct-150K on the hub: llava_v1_5_mix665k.json; its pictures from COCO train2017, "
        "GQA, OCR-VQA (every file saved as .jpg), TextVQA (train) and Visual Genome (both parts)",
    ),
}
_TOTALS = {"558k": 558_128, "665k": 665_298}


@dataclasses.dataclass(frozen=True)
class Missing:
    """Pictures that a folder lacks: how many, the first few, and how many stand there under another extension."""

    count: int
    names: tuple[str, ...]
    renamed: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` found; `str(prepared)` is the page a person reads.

    counts: part -> records. absent: folders that are not there. missing: folder -> what it lacks. lengths int64[n]: of
    the good records, in `unit`.
    """

    name: str
    file: str
    counts: dict[str, int]
    absent: tuple[str, ...]
    missing: dict[str, Missing]
    bad: tuple[Bad, ...]
    lengths: Int[np.ndarray, " n"]
    unit: str

    @property
    def ok(self) -> bool:
        """Whether a run would find every record and picture."""
        return not (self.absent or self.missing or self.bad)

    def __str__(self) -> str:
        layout, total = LAYOUTS[self.name], sum(self.counts.values())
        lines = [f"{self.file}: {total:,} records (published: {_TOTALS[self.name]:,})"]
        for part, count in self.counts.items():
            known = f" (published: {layout.parts[part]:,})" if part in layout.parts else ""
            lines.append(f"  {part:<12} {count:>9,}{known}")
        lines += [f"folder {folder} is not there" for folder in self.absent]
        for folder, lack in self.missing.items():
            renamed = f"; {lack.renamed:,} stand there under another extension: rename them" if lack.renamed else ""
            more = ", ..." if lack.count > len(lack.names) else ""
            lines.append(f"{folder}: {lack.count:,} pictures missing ({', '.join(lack.names)}{more}){renamed}")
        lines += [f"{len(self.bad):,} bad records:", *(f"  {bad}" for bad in self.bad[:20])] if self.bad else []
        if len(self.bad) > 20:
            lines.append(f"  and {len(self.bad) - 20:,} more")
        if len(self.lengths):
            lines += [f"{self.unit} a record:", *histogram(self.lengths)]
        lines.append("complete" if self.ok else f"not complete; it comes from {layout.origin}")
        return "\n".join(lines)


def prepare(
    root: str | os.PathLike,
    name: str | None = None,
    encode: Encode | None = None,
    progress: bool = True,
) -> Prepared:
    """Checks a LLaVA-1.5 set under the folder `root`: folders, records of each part, pictures that are not there.

    Args:
      name: of `LAYOUTS`; default the one whose file lies in `root`.
      encode: gives lengths in tokens; without it they are words.

    Raises:
      DataError: no such set in `root`, an unknown name, a broken JSON file.
    """
    root = epath.Path(root).expanduser()
    name = name or _found(root)
    if name not in LAYOUTS:
        raise DataError(f"{name!r} is no public layout; choose one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    images = root / layout.images if layout.images else root
    source = LlavaJson(root / layout.file, images=images)
    absent = tuple(str(images / folder) for folder in layout.folders if not (images / folder).is_dir())
    counts, lengths, bad = collections.Counter(), [], []
    wanted: dict[str, set[str]] = collections.defaultdict(set)
    for example, found in _read(source, encode, progress):
        if example is None:
            bad.append(found)
            continue
        pictures = [PurePosixPath(image.source).relative_to(str(images)) for image in example.images]
        counts[pictures[0].parts[0] if layout.parts and pictures else "pictures" if pictures else TEXT] += 1
        for picture in pictures:
            wanted[str(picture.parent)].add(picture.name)
        lengths.append(found)
    return Prepared(
        name=name,
        file=str(root / layout.file),
        counts=dict(sorted(counts.items())),
        absent=absent,
        missing=_missing(images, wanted, progress),
        bad=tuple(bad),
        lengths=np.asarray(lengths, np.int64),
        unit="words" if encode is None else "tokens",
    )


def _found(root: epath.Path) -> str:
    there = [name for name, layout in LAYOUTS.items() if (root / layout.file).is_file()]
    if len(there) != 1:
        files = ", ".join(layout.file for layout in LAYOUTS.values())
        raise DataError(
            f"{root}: holds {'both' if there else 'none'} of {files}; "
            + ("say which set is meant" if there else "give the folder with one of them (nothing is downloaded here)")
        )
    return there[0]


def _read(source: LlavaJson, encode: Encode | None, progress: bool) -> Iterator[tuple[Example | None, int | Bad]]:
    """(example, its length), or (None, what is wrong with it), record by record."""
    count: Callable[[Example], int] = _words if encode is None else lambda example: len(encode(example).tokens)
    with bar(len(source), "reading records", show=progress) as drawn:
        for index in range(len(source)):
            try:
                example = source[index]
                yield example, count(example)
            except ValueError as error:
                origin = source.origin(index)
                yield None, Bad(index, origin, str(error).removeprefix(origin).lstrip(": "))
            drawn.update()


def _words(example: Example) -> int:
    return sum(len(s.text.split()) for turn in example.turns for s in turn.segments if isinstance(s, Text))


def _missing(images: epath.Path, wanted: dict[str, set[str]], progress: bool) -> dict[str, Missing]:
    """Folder -> what it lacks; each folder is listed once, which a million questions for single files is not."""
    missing = {}
    with bar(len(wanted), "listing folders", show=progress) as drawn:
        for folder, names in sorted(wanted.items()):
            place = images / folder
            there = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
            if lack := sorted(names - there):
                stems = {PurePosixPath(name).stem for name in there}
                renamed = sum(PurePosixPath(name).stem in stems for name in lack)
                missing[str(place)] = Missing(len(lack), tuple(lack[:_SHOWN]), renamed)
            drawn.update()
    return missing


def svg(lengths: Int[np.ndarray, " n"], unit: str, title: str, bins: int = 40) -> str:
    """The lengths' histogram as a picture of its own."""
    counts, edges = np.histogram(lengths, bins)
    width, height, left, top = 720, 260, 60, 34
    step, tallest = (width - left - 20) / bins, max(int(counts.max()), 1)
    bars = "".join(
        f'<rect x="{left + i * step:.1f}" y="{top + height * (1 - n / tallest):.1f}" width="{step - 1:.1f}" '
        f'height="{height * n / tallest:.1f}"><title>{edges[i]:.0f} to {edges[i + 1]:.0f}: {n:,}</title></rect>'
        for i, n in enumerate(counts.tolist())
    )
    base = top + height
    ticks = "".join(
        f'<text x="{left + i * step:.1f}" y="{base + 16}" text-anchor="middle">{edges[i]:,.0f}</text>'
        for i in range(0, bins + 1, bins // 5)
    )
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {base + 44}" font-family="sans-serif" '
        f'font-size="12"><text x="{left}" y="20">{escaped}</text><g fill="#3b6ea5">{bars}</g>'
        f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{tallest:,}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>{ticks}'
        f'<text x="{left}" y="{base + 36}">{unit} a record</text></svg>\n'
    )
