"""Settings of a whole process: a command makes them for its user, a library never for those who import it."""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax


def spread_over_cores(groups: Sequence[int]) -> None:
    """Makes one CPU device a core, as many as divide each of `groups`; call it before anything asks for devices.

    XLA runs the small products of a small model on one core, and data parallelism keeps the others busy too. Where
    every core has a device, each device's products stay on its core (a word in XLA_FLAGS, which JAX reads later).
    Without effect where an accelerator is the default backend, or where XLA_FLAGS says how many devices there are.
    Processes that share a machine are given a device each by not calling it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        return
    cores = os.cpu_count() or 1
    ways = max(n for n in range(1, cores + 1) if all(count % n == 0 for count in groups))
    jax.config.update("jax_num_cpu_devices", ways)
    if ways == cores and "xla_cpu_multi_thread_eigen" not in flags:
        # Threads of one device would only wait for the other devices'.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def share_the_accelerator() -> None:
    """Lets JAX take memory of a GPU as it needs it, for another process has its part; before any backend starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@contextlib.contextmanager
def environment(**said: str) -> Iterator[None]:
    """Environment variables for a while; afterwards they are as they were."""
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def without_tracebacks_of_threads() -> None:
    """Silences what Orbax and TensorStore say of a failed save from their threads: it is raised too, and said by us.

    That is a traceback for each array, and one for each write that ends after the event loop it was started in.
    """

    def unraisable(found: Any, otherwise: Any = sys.unraisablehook) -> None:
        if str(found.exc_value) != "Event loop is closed":
            otherwise(found)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)
    sys.unraisablehook = unraisable


def take_short_turns() -> None:
    """Threads of Python pass the interpreter on after 0.5 ms instead of 5.

    While threads build batches, the one that starts each step waits a whole turn whenever it asks for the interpreter:
    on two cores the quickstart's first stage, built by threads, took 8.2 steps a second so and takes 12.
    """
    sys.setswitchinterval(5e-4)


def keep_freed_memory() -> None:
    """Asks glibc to keep what XLA frees on a CPU, in one arena for all threads.

    Small models otherwise spend a good part of a step in page faults of buffers given back and taken again. An arena
    a thread would keep as much for each: the quickstart (seed 1) took 2,149 MiB so and takes 1,250 in one. Never
    trimmed (-1): a threshold is an int, so at most 2 GiB, and a step that frees more gave it all back, 2 s of 5 in
    ``lvlm bench train``.
    Without effect elsewhere than on glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    for name, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1), (top_pad, 64 * 2**20)):
        mallopt(name, value)
