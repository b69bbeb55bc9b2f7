"""Which versions computed something: kept beside what must be understood, or repeated, later."""

import importlib.metadata
import platform
from collections.abc import Iterable

from lvlm_jax import __version__


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Name -> version of this library, the interpreter and each of `packages`, "absent" for one that is not there."""
    found = {"lvlm_jax": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
