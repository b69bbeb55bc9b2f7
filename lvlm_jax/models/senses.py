"""Named senses: further pairs of encoder and connector before one language model, each trained and shipped alone.

A pair's tokens stand in the text, wherever the model's own pictures enter. A third kind of encoder has no weights: it
passes on features that were computed elsewhere, of sound or a graph.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.connectors import ConnectorConfig, GatedConfig, LinearConfig, MlpConfig
from lvlm_jax.mesh import constrain
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.schema import SenseRows
from lvlm_jax.processing.senses import SenseSpec
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision import VisionConfig

_EACH = (LinearConfig, MlpConfig, GatedConfig)
"""Connectors that make a token of each feature, whatever stands beside it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSlot:
    """Features computed elsewhere: at most `length` vectors of `width` values in a row."""

    length: int
    width: int

    def __post_init__(self) -> None:
        for name in ("length", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")

    @property
    def patches(self) -> int:
        """Places of a row."""
        return self.length

    @property
    def values(self) -> int:
        """Values of a place."""
        return self.width

    @property
    def features(self) -> int:
        """Vectors that a row gives."""
        return self.length

    def build(self, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, which has no weights."""
        return Passed(dtype)


class Passed(nn.Module):
    """Features as they come."""

    dtype: DTypeLike = jnp.float32

    def features(
        self, patches: Float[Array, "N P C"], positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]
    ) -> Float[Array, "N P C"]:
        """What it was given."""
        return patches.astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sense:
    """One pair. image: how an encoder's pictures are prepared; None for a `FeatureSlot`."""

    encoder: VisionConfig | FeatureSlot
    connector: ConnectorConfig
    image: ImageSpec | None = None

    def __post_init__(self) -> None:
        if (self.image is None) != isinstance(self.encoder, FeatureSlot):
            kind = type(self.encoder).__name__.removesuffix("Config")
            need = "is for pictures: leave it out" if self.image else "says how its pictures are prepared: give one"
            raise ValueError(f"image={self.image} with an encoder of kind {kind}: image {need}")
        if (frames := getattr(self.encoder, "frames", 1)) > 1:
            raise ValueError(f"encoder.frames={frames}: a named sense reads each vision row by itself; take frames=1")
        _ = self.spec  # its own checks

    @property
    def tokens(self) -> int:
        """Positions of a full row (Q)."""
        return self.connector.tokens(self.encoder.features)

    @property
    def spec(self) -> SenseSpec:
        """How its segments are read."""
        each = self.image is None and isinstance(self.connector, _EACH)
        return SenseSpec(
            tokens=self.tokens, length=self.encoder.patches, width=self.encoder.values, image=self.image, each=each
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedSense:
    """A pair by itself: its name, and the width of the language model that it was trained before."""

    name: str
    sense: Sense
    width: int


def check_width(connector: ConnectorConfig, encoder_width: int, width: int, where: str, encoder: str) -> None:
    """ValueError where a connector that leaves the encoder's width stands before a decoder of another.

    Args:
      where, encoder: the fields of connector and encoder, for messages.
    """
    if not getattr(connector, "project", True) and encoder_width != width:
        raise ValueError(
            f"{where}.project=False gives visual tokens of {encoder_width} values, the width of {encoder}, but they "
            f"stand among the words of a decoder of llm.width={width}; set {where}.project=True"
        )


class Pair(nn.Module):
    """An encoder and its connector. Parameters: ``vision`` (none for features), ``connector``."""

    sense: Sense
    width: int
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The two parts."""
        self.vision = self.sense.encoder.build(self.dtype, self.scan, self.remat)
        self.connector = self.sense.connector.build(self.width, self.dtype, self.scan, self.remat)

    def __call__(
        self, patches: Float[Array, "G N P C"], positions: Int[Array, "G N P 2"], segments: Int[Array, "G N P"]
    ) -> Float[Array, "G M D"]:
        """Rows of a group -> the M = N*Q tokens of each group, in the language model's width."""
        groups, rows = patches.shape[:2]
        flat = lambda x: constrain(x.reshape(groups * rows, *x.shape[2:]), ("batch",) + (None,) * (x.ndim - 2))  # noqa: E731
        tokens = self.connector(self.vision.features(flat(patches), flat(positions), flat(segments)))
        return tokens.reshape(groups, rows * tokens.shape[1], tokens.shape[2])


class Senses(nn.Module):
    """All pairs of a model. Parameters: one part a name."""

    senses: tuple[tuple[str, Sense], ...]
    width: int
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, rows: Mapping[str, SenseRows]) -> dict[str, Float[Array, "G M D"]]:
        """The tokens of each sense that `rows` feeds.

        Raises:
          ValueError: a name that is none of the model's.
        """
        if unknown := sorted(rows.keys() - dict(self.senses).keys()):
            known = [name for name, _ in self.senses]
            raise ValueError(f"batch.senses names {unknown}; the model's senses are {known}")
        out = {}
        for name, sense in self.senses:
            if name in rows and (rows[name].patches.shape[1] or self.is_initializing()):
                one = rows[name]
                pair = Pair(sense, self.width, self.dtype, self.scan, self.remat, name=name)
                out[name] = pair(one.patches, one.patch_positions, one.patch_segments)
        return out


def dummy_rows(sense: Sense, rows: int, length: int) -> SenseRows:
    """A smallest feed of the right shapes, for `init`: zeros, nothing in the text."""
    p, c = sense.encoder.patches, sense.encoder.values
    return SenseRows(
        index=jnp.full((rows, length), -1, jnp.int32),
        patches=jnp.zeros((1, 1, p, c), jnp.float32),
        patch_positions=jnp.zeros((1, 1, p, 2), jnp.int32),
        patch_segments=jnp.ones((1, 1, p), jnp.int32),
    )
