"""How full packed rows are, beside the best that anybody could do with the whole set in memory.

    lvlm data packing                         # the committed histograms
    lvlm data packing --llava train.json ...  # your own data

prints what stands in this folder's README.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lvlm_jax.data.packing import PackingPlan, PackingStats, best_fit_rows
from lvlm_jax.shapes import Int

LENGTHS = (2048, 4096, 8192)
ENOUGH = 0.99
"""The share of the offline packing that a plan must reach."""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many examples have so many tokens and pictures.

    lengths, pictures int64[n]: of each example. about: where they are from.
    """

    about: str
    lengths: Int[np.ndarray, " n"]
    pictures: Int[np.ndarray, " n"]


def committed() -> dict[str, Histogram]:
    """The histograms that ship with the package (``histograms.json``).

    They are modelled: counts and layouts of the published sets, log-normal lengths of text. Run the command on your
    own data for its own.
    """
    found = {}
    for name, entry in json.loads(Path(__file__).with_name("histograms.json").read_text()).items():
        columns = (np.repeat(np.asarray(entry[key], np.int64), entry["count"]) for key in ("tokens", "pictures"))
        found[name] = Histogram(entry["about"], *columns)
    return found


@dataclasses.dataclass(frozen=True)
class Line:
    """One packing: rows of `length` positions, N vision rows a group, beside what offline packing needs.

    offline: rows of best-fit-decreasing over the whole set at once, text alone. share: the fill that the plan reaches
    of that one's, offline / plan rows. left_out: examples longer than a row.
    """

    name: str
    length: int
    groups: int
    vision_rows: int
    offline: int
    left_out: int
    stats: PackingStats

    @property
    def share(self) -> float:
        """The plan's fill over the offline packing's."""
        return self.offline / self.stats.rows

    @property
    def offline_fill(self) -> float:
        """How full the offline packing's rows are."""
        return self.stats.text_fill / self.share


def measure(name: str, histogram: Histogram, length: int, rows: int = 64, groups: int = 8) -> Line:
    """Plans one epoch, with the fewest picture slots at which the plan reaches `ENOUGH` of the offline packing.

    A set of a few hundred rows may reach it with none, since an epoch's last group is not full: then the best.
    """
    fits = histogram.lengths <= length
    lengths, pictures = np.where(fits, histogram.lengths, 0), np.where(fits, histogram.pictures, 0)
    used = np.flatnonzero(lengths)
    offline = len(best_fit_rows(used, lengths[used], np.zeros(len(used), np.int64), length, 0)[0])
    need = -(-int(pictures.sum()) * rows // groups // offline)
    fewest = max(need, int(pictures.max(initial=0)))
    found = []
    for vision_rows in range(fewest, 2 * fewest + 1):
        plan = PackingPlan(lengths, pictures, seed=0, rows=rows, length=length, groups=groups, vision_rows=vision_rows)
        found.append(Line(name, length, groups, vision_rows, offline, int((~fits).sum()), plan.stats()))
        if found[-1].share >= ENOUGH:
            return found[-1]
    return max(found, key=lambda line: line.share)


def lines(
    histograms: dict[str, Histogram] | None = None,
    lengths: Sequence[int] = LENGTHS,
    rows: int = 64,
    groups: Sequence[int] = (8, 64),
) -> Iterator[Line]:
    """Every packing of the table."""
    for name, histogram in (histograms or committed()).items():
        for length in lengths:
            for count in groups:
                yield measure(name, histogram, length, rows=rows, groups=count)


HEAD = (
    "| data | positions | groups | pictures a group | rows offline | rows | of offline | padded text | "
    "padded vision slots |\n| --- | --: | --: | --: | --: | --: | --: | --: | --: |"
)


def row(line: Line) -> str:
    """A line of the table."""
    stats = line.stats
    return (
        f"| {line.name} | {line.length:,} | {line.groups} | {line.vision_rows} | {line.offline:,} | {stats.rows:,} | "
        f"{line.share:.4f} | {1 - stats.text_fill:.1%} | {1 - stats.vision_fill:.1%} |"
    )
