"""Timings of several sides in turns, and what becomes of them: a ratio a round, since a machine's speed drifts."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

OURS = "ours"
SETTLE = 0.1
"""Seconds between two measurements: the threads of the side before, which spin for a while, go to sleep."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Least, median and largest of some figures."""

    least: float
    median: float
    largest: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """Of at least one figure."""
        return cls(min(figures), statistics.median(figures), max(figures))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one piece of work.

    work: how many `unit`s one measurement is of ("tokens", "pictures"). seconds: of each side, one a round; `OURS` is
    among them. flops: the model's own count for one measurement, None where there is none. difference: largest relative
    difference of the two sides' results, None where there was no other side.
    """

    name: str
    work: int | float
    unit: str
    seconds: Mapping[str, Sequence[float]]
    flops: float | None = None
    difference: float | None = None

    @property
    def others(self) -> list[str]:
        """The other sides."""
        return [side for side in self.seconds if side != OURS]

    def rate(self, side: str) -> Spread:
        """Units a second."""
        return Spread.of([self.work / seconds for seconds in self.seconds[side]])

    def ratio(self, side: str) -> Spread:
        """How many times faster than another side we are, round by round; above 1 is faster."""
        return Spread.of([theirs / ours for ours, theirs in zip(self.seconds[OURS], self.seconds[side], strict=True)])


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int, say: Say) -> dict[str, list[float]]:
    """Seconds of each side, a measurement a round: one after the other, the order reversed in every second round.

    A side is called once more before the first round, which is not counted: it compiles and warms caches.
    """
    names = list(sides)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 == 0 else reversed(names):
            gc.collect()
            time.sleep(SETTLE)
            seconds = sides[name]()
            if number:
                taken[name].append(seconds)
        last = ", ".join(f"{name} {seconds[-1]:.3f} s" for name, seconds in taken.items()) if number else "warm"
        say(f"  round {number} of {rounds}: {last}")
    return taken


def clocked(work: Callable[[], object]) -> float:
    """Seconds of one call, which must not return before its work is done."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
