"""Disks of a test's own that fill up, turn read-only and vanish, where this machine lets the test mount one."""

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def disk(folder: Path, megabytes: int = 8) -> Iterator[Path]:
    """A file system of that size at `folder`, empty."""
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)


def mount(*words) -> None:
    """The command of that name."""
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


@functools.cache
def can_mount() -> bool:
    """Whether this user may mount (root outside of a plain container may)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with disk(Path(folder) / "disk"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def fill(folder: Path) -> Path:
    """Writes a file until nothing more fits; returns it."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast
