"""What every part of a bench is given."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.bench.case import Case
from lvlm_jax.bench.reference import Reference
from lvlm_jax.bench.rounds import Say

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""The most that two sides may differ, as a share of the largest value of the torch side, by the dtype they run in."""


class SidesDiffer(RuntimeError):
    """The two sides computed different things, so their times say nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One run of a bench.

    folder: the exported model, with room for files of inputs. rows: of a training batch. dtype: of the products, by
    name. compiled: also measure torch.compile. reference: the torch side, None for absolute figures.
    """

    case: Case
    folder: Path
    rounds: int
    rows: int
    dtype: str
    compiled: bool
    reference: Reference | None
    say: Say

    def compare(self, what: str, ours: Any, theirs: Any, side: str, tolerance: float | None = None) -> float:
        """Largest difference as a share of the largest value of theirs.

        Raises:
          SidesDiffer: it is above the tolerance of the dtype (or the one given), or shapes differ.
        """
        ours, theirs = (np.asarray(values, np.float64) for values in (ours, theirs))
        if ours.shape != theirs.shape:
            raise SidesDiffer(f"{what}: shape {list(ours.shape)} here and {list(theirs.shape)} of {side}")
        tolerance = TOLERANCES[self.dtype] if tolerance is None else tolerance
        found = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not found <= tolerance:
            raise SidesDiffer(
                f"{what}: this library and {side} differ by {found:.2g} of the largest value, more than {tolerance:g}, "
                "so they did not compute the same and their times are not compared"
            )
        return found
