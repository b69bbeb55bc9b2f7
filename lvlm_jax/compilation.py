"""Compiled programs kept on disk, so that a run that starts again does not compile again.

JAX's persistent compilation cache does the work; its key holds the program, the flags, the versions and, on a CPU, the
machine's features, so that another machine compiles its own. It does not check what it reads back: an entry cut off by
a kill is compiled anew at every start, and with the package zstandard installed a flipped bit would run. So each entry
has its SHA-256 beside it here, and one without a good one is thrown away before JAX looks.
"""

import contextlib
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

from lvlm_jax import hosts

_COMPILED = "/jax/core/compile/backend_compile_duration"  # after each compilation, when its entry is written
_ENTRY = "-cache"


def keep(folder: str | os.PathLike, least_seconds: float = 0.1) -> bool:
    """Keeps what this process compiles in `folder`, and takes from it what an earlier one did: a process-wide setting.

    Only what took `least_seconds` is kept; one process at a time may use the folder, or the processes of one run.
    Returns False, and sets nothing, where the user has chosen a cache (JAX_COMPILATION_CACHE_DIR).
    """
    if jax.config.jax_compilation_cache_dir:
        return False
    folder = Path(folder).absolute()  # a process that changes its directory still finds it
    if jax.process_index() == 0:  # which alone writes
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.glob(f"*{_ENTRY}"):
            if not _is_whole(entry):
                entry.unlink()
                _beside(entry).unlink(missing_ok=True)
        sealed = {entry.name for entry in folder.glob(f"*{_ENTRY}")}
        monitoring.register_event_duration_secs_listener(functools.partial(_seal, folder, sealed))
    hosts.agree(0)  # the others read only what it has looked at
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    # XLA's own caches would put the folder's path into every key, so that a moved workdir compiled all anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    return True


def _seal(folder: Path, sealed: set[str], event: str, seconds: float, **details: Any) -> None:
    """Writes the SHA-256 of entries that are not among those `sealed`, after each compilation."""
    if event == _COMPILED:
        with contextlib.suppress(OSError):  # a full disk costs the next start a compilation, not this run its life
            for entry in folder.glob(f"*{_ENTRY}"):
                if entry.name not in sealed:
                    _beside(entry).write_text(_digest(entry))
                    sealed.add(entry.name)


def _is_whole(entry: Path) -> bool:
    try:
        return _beside(entry).read_bytes() == _digest(entry).encode()
    except FileNotFoundError:
        return False


def _beside(entry: Path) -> Path:
    return entry.with_name(entry.name + ".sha256")


def _digest(entry: Path) -> str:
    return hashlib.sha256(entry.read_bytes()).hexdigest()
