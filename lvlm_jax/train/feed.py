"""Where a run's batches come from, and the thread that reads and places them ahead of the step."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Batches(Protocol):
    """Where batches come from: batch k is a pure function of k, so a run resumes by its number alone."""

    def iterate(self, start: int) -> Iterator[tuple[int, Any]]:
        """(k, batch) for k = start, start + 1, ...; the batch as host arrays, this host's rows of it."""


class Feed:
    """Reads and places one batch ahead in a thread, so that the host works while the device does."""

    def __init__(self, batches: Batches, start: int, stop: int, place: Callable) -> None:
        self.busy: Any = None  # an output of the step under way
        self._args = batches, start, stop, place
        self._queue: queue.Queue = queue.Queue(1)
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="batches")

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._halt.set()
        self._thread.join(timeout=10)

    def _fill(self) -> None:
        batches, start, stop, place = self._args
        try:
            k = start - 1
            for expected, (k, batch) in zip(range(start, stop), batches.iterate(start)):
                if k != expected:
                    raise ValueError(f"asked for batch {expected}, got batch {k}: iterate(start) must begin at start")
                if not self._offer(place(batch)):
                    return
            if k < stop - 1:
                raise ValueError(f"the batches end after {k + 1}, but the stage runs {stop} steps")
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: Any) -> bool:
        while not self._halt.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self) -> tuple[Any, float]:
        """(batch, seconds waited while the device had nothing to do: an upper bound)."""
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        idle = self.busy is not None and self.busy.is_ready()
        return item, time.perf_counter() - start if idle else 0.0
