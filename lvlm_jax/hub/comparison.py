"""What a comparison with the torch library found, part by part."""

import dataclasses

TOLERANCE = 2e-5
"""Largest difference allowed, in float32, as a share of the largest reference value."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One stage of the two models: largest absolute difference, and largest absolute value of the reference."""

    name: str
    difference: float
    largest: float

    @property
    def ratio(self) -> float:
        """Difference as a share of the largest value."""
        return self.difference / self.largest if self.largest else float(self.difference > 0)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `verify` found; ``print(comparison)`` shows it as a table.

    keys: what the torch library said of the folder's keys (missing, unexpected, of another shape); must be empty.
    """

    parts: tuple[Part, ...]
    keys: tuple[str, ...] = ()
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether every part is within the tolerance and no key was left over."""
        return not self.keys and all(part.ratio <= self.tolerance for part in self.parts)

    def __str__(self) -> str:
        lines = [f"{'part':<20}{'difference':>12}{'largest':>12}{'share':>12}"]
        for part in self.parts:
            mark = "" if part.ratio <= self.tolerance else "  too large"
            lines.append(f"{part.name:<20}{part.difference:>12.3e}{part.largest:>12.4g}{part.ratio:>12.2e}{mark}")
        lines += [f"key: {key}" for key in self.keys]
        return "\n".join([*lines, f"{'passed' if self.passed else 'FAILED'} at {self.tolerance:g}"])
