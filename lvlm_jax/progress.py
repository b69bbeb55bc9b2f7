"""Progress on long work: a bar where somebody looks, a line now and then where it goes to a file."""

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines of a log."""


class _Lines(io.TextIOBase):
    """A log under a bar: each redrawing but the first, empty one becomes a line of its own."""

    drawn = 0

    def write(self, text: str) -> int:
        line = text.replace("\r", "").rstrip()
        self.drawn += bool(line)
        if line and self.drawn > 1:
            sys.stderr.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Says on standard error what is waited for; on a terminal with the seconds so far, until it is done."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield
        return
    began, done = time.monotonic(), threading.Event()
    show = lambda end="": print(f"\r{text}, {time.monotonic() - began:.0f} s", end=end, file=sys.stderr, flush=True)  # noqa: E731

    def tick() -> None:
        while not done.wait(1.0):
            show()

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        show("\n")


def bar(total: int, desc: str, unit: str = "", show: bool = True, **options: Any) -> "tqdm":
    """A tqdm bar on standard error; in a file, a line each `EVERY` seconds and one at the end."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": EVERY, "maxinterval": EVERY}
    return tqdm(total=total, desc=desc, unit=unit, disable=not show, dynamic_ncols=True, **options)
