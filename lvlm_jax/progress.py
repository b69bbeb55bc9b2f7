"""Progress on long work: a bar where somebody looks, a line now and then where it goes to a file."""

import io
import sys
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


def bar(total: int, desc: str, unit: str = "", show: bool = True, **options: Any) -> "tqdm":
    """A tqdm bar on standard error; in a file, a line each `EVERY` seconds and one at the end."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": EVERY, "maxinterval": EVERY}
    return tqdm(total=total, desc=desc, unit=unit, disable=not show, dynamic_ncols=True, **options)
