"""Whole systems by name: data only."""

import difflib

from lvlm_jax.zoo import llava
from lvlm_jax.zoo.spec import Spec

SYSTEMS: dict[str, Spec] = {**llava.SYSTEMS}
"""Every system there is."""


def spec(name: str) -> Spec:
    """A system by name.

    Raises:
      ValueError: no such system, with the nearest names.
    """
    if name not in SYSTEMS:
        near = difflib.get_close_matches(name, SYSTEMS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown system {name!r}; {hint}The systems are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


__all__ = ["SYSTEMS", "Spec", "spec"]
