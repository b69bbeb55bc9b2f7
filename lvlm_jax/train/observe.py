"""What a run shows of its devices: a profiler's trace of some steps, and what filled the memory when it ran out."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from lvlm_jax.errors import OutOfMemory


class Trace:
    """A profiler's trace of steps `first` to `last`, below ``profile/`` of a stage's folder; nothing for ``()``.

    XProf and TensorBoard's profile plugin show it. Each process traces its own devices.
    """

    def __init__(self, steps: Sequence[int], folder: str | os.PathLike) -> None:
        self.first, self.last = steps or (0, -1)
        self.folder = os.path.join(os.fspath(folder), "profile")
        self._runs = False

    def __call__(self, step: int, waits_for: Any = None) -> None:
        """`step` steps are done; `waits_for`: arrays of the last one, which a trace must contain to its end."""
        if self._runs and step >= self.last:
            jax.block_until_ready(waits_for)
            self.close()
        elif not self._runs and self.first <= step + 1 <= self.last:
            options = jax.profiler.ProfileOptions()
            # No frames of Python: as a trace ends while other threads run, CPython up to 3.13.5 crashes (its issue
            # 137400), and later ones may where a thread ends. XLA's programs, transfers and host calls are all there.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._runs = True

    def close(self) -> None:
        """Writes what there is."""
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False


@contextlib.contextmanager
def memory(folder: str | os.PathLike) -> Iterator[None]:
    """Writes ``memory.prof`` (for pprof: which line of the program made what fills the device) when memory runs out.

    Raises:
      OutOfMemory: in place of XLA's RESOURCE_EXHAUSTED (on a CPU of jax 0.7 INTERNAL, and "Out of memory").
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        file = os.path.join(os.fspath(folder), "memory.prof")
        jax.profiler.save_device_memory_profile(file)
        first = str(error).partition("\n")[0]
        raise OutOfMemory(
            f"{first} What fills the device stands in {file} (pprof shows it). Fewer rows with "
            "accumulate, remat='full', mesh='FSDP', bfloat16 or a shorter length need less; lvlm plan says how much"
        ) from error
