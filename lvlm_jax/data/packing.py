"""Which examples share which row of which batch, planned from lengths alone: batch k is a function of (seed, k).

Units of the plan, small to large: an example; a row (examples of at most `length` tokens together); a group (rows that
share one data shard and its `vision_rows` picture slots); a batch (`groups` groups). An epoch is a sequence of groups
that holds every example exactly once (or, of a mixture with weights, each part's share). Epochs follow one another
without a seam: the batch in which one epoch's groups run out goes on with the next epoch's, so no example is lost or
repeated within an epoch and no batch is short. The only empty rows are in a group whose pictures are used up and in the
last group of an epoch.
"""

import bisect
import dataclasses
import heapq
import math
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from lvlm_jax.shapes import Int

Row = tuple[int, ...]
_KEPT_EPOCHS = 2  # neighbours of a boundary; older ones are planned again when somebody goes back


@dataclasses.dataclass(frozen=True)
class PackingStats:
    """How full the first epoch's batches are.

    text_fill and vision_fill are used over available slots, in [0, 1] (vision_fill is 0 where there are no slots).
    """

    examples: int
    left_out: int
    rows: int
    batches_per_epoch: float
    text_fill: float
    vision_fill: float
    examples_per_row: float

    def __str__(self) -> str:
        out = f", {self.left_out:,} left out" if self.left_out else ""
        return (
            f"{self.examples:,} examples{out} in {self.rows:,} rows ({self.examples_per_row:.2f} a row), "
            f"{self.batches_per_epoch:,.1f} batches an epoch; filled: text {self.text_fill:.1%}, "
            f"pictures {self.vision_fill:.1%}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """How often each part of a source is drawn, where not every record comes once an epoch.

    sizes: records of each part; part p has the numbers after those of the parts before it. weights: each part's share
    of the examples, as a proportion.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def draw(self, used: Int[np.ndarray, " n"], seed: int | None, epoch: int) -> Int[np.ndarray, " m"]:
        """The examples of an epoch, part after part: a function of (seed, epoch) alone.

        Of the records `used` (sorted), part p's share of n examples is taken from its endless row of orders, each of
        which holds every record once; an epoch goes on where the one before stopped.
        """
        ends = np.cumsum(self.sizes)
        drawn = []
        for part, (start, stop, weight) in enumerate(zip(ends - self.sizes, ends, self.weights, strict=True)):
            own = used[(used >= start) & (used < stop)]
            if not len(own):
                raise ValueError(f"part {part} of the mixture has no record that can be used, but a weight of {weight}")
            each = weight / sum(self.weights) * len(used)
            first, last = math.floor(epoch * each + 0.5), math.floor((epoch + 1) * each + 0.5)
            for lap in range(first // len(own), -(-last // len(own))):
                order = own if seed is None else np.random.default_rng([seed, part, lap]).permutation(own)
                drawn.append(order[max(first - lap * len(own), 0) : last - lap * len(own)])
        return np.concatenate(drawn)


class PackingPlan:
    """The rows of every batch of an endless run.

    Args:
      lengths: tokens of each example, visual ones included; 0 leaves the example out (a bad record that is skipped).
      pictures: vision rows that each example needs.
      seed: order of the epochs (each has its own); None keeps the source's order, in every epoch.
      rows: B, text rows of a batch.
      length: T, tokens of a row.
      groups: G, groups of a batch; divides `rows`.
      vision_rows: N, vision rows of a group.
      pack: several examples a row, by best fit decreasing; otherwise one example a row, in order.
      window: examples that are sorted and packed together; larger fills better and mixes long with short further apart.
      shares: how often each part of a mixture is drawn; None takes every example once an epoch.

    Raises:
      ValueError: sizes that do not fit together; an example longer than T or with more vision rows than N.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Shaped[np.ndarray, " n"],
        pictures: Sequence[int] | Shaped[np.ndarray, " m"],
        *,
        seed: int | None,
        rows: int,
        length: int,
        groups: int = 1,
        vision_rows: int = 0,
        pack: bool = True,
        window: int = 8192,
        shares: Shares | None = None,
    ):
        self.lengths, self.pictures = np.asarray(lengths, np.int64), np.asarray(pictures, np.int64)
        self.seed, self.rows, self.length, self.groups = seed, rows, length, groups
        self.vision_rows, self.pack, self.window, self.shares = vision_rows, pack, window, shares
        self._check()
        self._used = np.flatnonzero(self.lengths)
        self._starts = [0]  # first group number of each epoch planned so far, and of the next
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.RLock()
        self._epoch(0)

    def __repr__(self) -> str:
        return (
            f"PackingPlan(examples={len(self._used)}, tokens={self.lengths.sum()}, seed={self.seed}, rows={self.rows}, "
            f"length={self.length}, groups={self.groups}, vision_rows={self.vision_rows}, pack={self.pack}, "
            f"window={self.window}{f', shares={self.shares.weights}' if self.shares else ''})"
        )

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def rows_per_group(self) -> int:
        """Text rows that share one data shard's pictures, B / G."""
        return self.rows // self.groups

    def batch(self, k: int) -> list[Row]:
        """The B rows of batch `k`, each the indices of its examples (an empty row is all padding)."""
        if k < 0:
            raise ValueError(f"batch {k}: batches are numbered from 0")
        rows: list[Row] = []
        for group in range(k * self.groups, (k + 1) * self.groups):
            epoch = self._epoch_of(group)
            order, offsets = self._epoch(epoch)
            first = (group - self._starts[epoch]) * self.rows_per_group
            for row in range(first, first + self.rows_per_group):
                rows.append(tuple(order[offsets[row] : offsets[row + 1]].tolist()))
        return rows

    def epoch(self, k: int) -> float:
        """Epochs finished when batch `k` begins, as a fraction of groups."""
        group = k * self.groups
        epoch = self._epoch_of(group)
        start, stop = self._starts[epoch : epoch + 2]
        return epoch + (group - start) / (stop - start)

    def stats(self) -> PackingStats:
        """How full the rows and picture slots of the first epoch are."""
        groups = self._starts[1]
        rows = groups * self.rows_per_group
        slots = groups * self.vision_rows
        drawn, _ = self._epoch(0)
        return PackingStats(
            examples=len(drawn),
            left_out=len(self.lengths) - len(self._used),
            rows=rows,
            batches_per_epoch=groups / self.groups,
            text_fill=float(self.lengths[drawn].sum()) / (rows * self.length),
            vision_fill=float(self.pictures[drawn].sum()) / slots if slots else 0.0,
            examples_per_row=len(drawn) / rows,
        )

    def _check(self) -> None:
        if self.lengths.shape != self.pictures.shape or self.lengths.ndim != 1:
            raise ValueError(f"lengths {self.lengths.shape} and pictures {self.pictures.shape} must be two equal lists")
        for name in ("rows", "length", "groups", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.rows % self.groups:
            raise ValueError(f"{self.rows} rows do not divide into {self.groups} groups; make rows a multiple of them")
        if self.shares is not None and sum(self.shares.sizes) != len(self.lengths):
            raise ValueError(
                f"shares are of {sum(self.shares.sizes)} examples, but there are {len(self.lengths)} lengths"
            )
        if not self.lengths.any():
            raise ValueError("no example to plan: every length is 0 (were all records skipped as bad?)")
        for index in np.flatnonzero(self.lengths > self.length)[:1]:
            raise ValueError(
                f"example {index} has {self.lengths[index]} tokens but a row holds {self.length}; "
                f"raise the row length to at least {self.lengths.max()}, shorten the example, or leave it out"
            )
        over = (self.pictures > self.vision_rows) & (self.lengths > 0)
        for index in np.flatnonzero(over)[:1]:
            raise ValueError(
                f"example {index} has {self.pictures[index]} pictures, tiles or frames but a group holds "
                f"{self.vision_rows}; raise vision_rows to at least {self.pictures.max()}, or leave the example out"
            )

    def _epoch_of(self, group: int) -> int:
        with self._lock:
            while self._starts[-1] <= group:
                self._epoch(len(self._starts) - 1)
            return bisect.bisect_right(self._starts, group) - 1

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(example indices in row order, row offsets) of one epoch; rows are a multiple of `rows_per_group`."""
        with self._lock:
            if epoch not in self._epochs:
                rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
                pool = self._used if self.shares is None else self.shares.draw(self._used, self.seed, epoch)
                order = pool if rng is None else rng.permutation(pool)
                groups = self._packed(order, rng) if self.pack else self._in_order(order)
                counts = np.fromiter((len(row) for group in groups for row in group), np.int64)
                flat = np.fromiter((i for group in groups for row in group for i in row), np.int64, len(order))
                while len(self._epochs) >= _KEPT_EPOCHS:
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = flat, np.concatenate([[0], np.cumsum(counts)])
                if epoch == len(self._starts) - 1:
                    self._starts.append(self._starts[-1] + len(groups))
            return self._epochs[epoch]

    def _in_order(self, order: np.ndarray) -> list[list[Row]]:
        """One example a row; a group closes early when the next example's pictures do not fit any more."""
        groups: list[list[Row]] = []
        group, used = [], 0
        for index, need in zip(order.tolist(), self.pictures[order].tolist(), strict=True):
            if len(group) == self.rows_per_group or used + need > self.vision_rows:
                groups.append(group)
                group, used = [], 0
            group.append((index,))
            used += need
        groups.append(group)
        return [group + [()] * (self.rows_per_group - len(group)) for group in groups]

    def _packed(self, order: np.ndarray, rng: np.random.Generator | None) -> list[list[Row]]:
        """Windows of the epoch's order, each packed into rows and the rows into groups; a remainder moves on."""
        groups: list[list[Row]] = []
        rest: list[int] = []
        for start in range(0, len(order), self.window):
            last = start + self.window >= len(order)
            pool = np.concatenate([np.asarray(rest, np.int64), order[start : start + self.window]])
            rows, loads = best_fit_rows(pool, self.lengths[pool], self.pictures[pool], self.length, self.vision_rows)
            made, rest = _balanced_groups(rows, loads, self.rows_per_group, self.vision_rows, last)
            for position in range(len(made)) if rng is None else rng.permutation(len(made)).tolist():
                group = made[position]
                groups.append(group if rng is None else [group[i] for i in rng.permutation(len(group)).tolist()])
        return groups


def best_fit_rows(
    pool: Int[np.ndarray, " n"],
    lengths: Int[np.ndarray, " n"],
    pictures: Int[np.ndarray, " n"],
    length: int,
    vision_rows: int,
) -> tuple[list[Row], list[int]]:
    """Best fit decreasing under both limits: (rows of indices from `pool`, pictures of each row).

    Longest first, each into the fullest row that still takes it. Open rows are kept by (picture room, token room), the
    picture room clipped at the most that any example needs, so a look-up is a few bisections.
    """
    rows: list[list[int]] = []
    loads: list[int] = []
    most = int(pictures.max(initial=0))
    rooms: list[list[int]] = [[] for _ in range(most + 1)]  # [picture room] -> sorted token rooms that exist
    members: list[dict[int, list[int]]] = [{} for _ in range(most + 1)]  # [picture room][token room] -> rows
    by_size = np.lexsort((-pictures, -lengths))
    for index, size, need in zip(
        pool[by_size].tolist(), lengths[by_size].tolist(), pictures[by_size].tolist(), strict=True
    ):
        best, room = -1, length + 1
        for level in range(need, most + 1):
            at = bisect.bisect_left(rooms[level], size)
            if at < len(rooms[level]) and rooms[level][at] < room:
                best, room = level, rooms[level][at]
        if best < 0:
            row, room = len(rows), length
            rows.append([])
            loads.append(0)
        else:
            row = members[best][room].pop()
            if not members[best][room]:
                del members[best][room]
                rooms[best].pop(bisect.bisect_left(rooms[best], room))
        rows[row].append(index)
        loads[row] += need
        if room > size:  # a full row needs no shelf
            level = min(vision_rows - loads[row], most)
            shelf = members[level].setdefault(room - size, [])
            if not shelf:
                bisect.insort(rooms[level], room - size)
            shelf.append(row)
    return [tuple(row) for row in rows], loads


def _balanced_groups(
    rows: list[Row], loads: list[int], rows_per_group: int, vision_rows: int, last: bool
) -> tuple[list[list[Row]], list[int]]:
    """Rows into groups, most pictures first, each to the group with the fewest so far: (groups, examples left over).

    Before the last window only as many groups open as rows or pictures fill; the surplus rows' examples move on to the
    next window. In the last one every row gets a place, so a group may have empty rows.
    """
    total = sum(loads)
    if last:
        count = max(-(-len(rows) // rows_per_group), -(-total // vision_rows) if vision_rows else 0, 1)
    else:
        count = max(len(rows) // rows_per_group, total // vision_rows if vision_rows else 0)
    # Full rows first among equals: what is left over before the last window is then the least filled.
    order = sorted(range(len(rows)), key=lambda row: (-loads[row], row))
    while True:
        groups: list[list[Row]] = [[] for _ in range(count)]
        heap = [(0, 0, group) for group in range(count)]
        surplus: list[int] = []
        for row in order:
            if not heap or heap[0][0] + loads[row] > vision_rows:
                surplus.append(row)
                continue
            used, size, group = heapq.heappop(heap)
            groups[group].append(rows[row])
            if size + 1 < rows_per_group:
                heapq.heappush(heap, (used + loads[row], size + 1, group))
        fits = not surplus if last else len(surplus) <= rows_per_group and sum(loads[r] for r in surplus) <= vision_rows
        if fits:
            rest = [index for row in surplus for index in rows[row]]
            return [group + [()] * (rows_per_group - len(group)) for group in groups], rest
        count += 1
