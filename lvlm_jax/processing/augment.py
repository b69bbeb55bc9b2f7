"""Random changes of training pictures, as a recipe names them."""

import dataclasses

from lvlm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a training picture (`processing.image.augment`)."""

    flip: bool = False
    shift: int = 0
    zoom: float = 0.0
    rotate: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("zoom", 1), ("colour", 1), ("rotate", 180.0001)):
            if not 0 <= getattr(self, name) < most:
                raise ConfigError(f"augment.{name}={getattr(self, name)}: from 0 (off) to below {most:g}")

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self != Augment()
