"""Pictures at their own resolution as a conversation is written down: what `encode` asks of each and of all."""

import dataclasses

from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.native import Grid, Packer, Place, positions
from lvlm_jax.processing.schema import Clip, Encoded, Image
from lvlm_jax.processing.tiles import Span
from lvlm_jax.processing.video import shown_size, taken


class Shared:
    """The pictures of one conversation, which share its vision rows (`native.Packer`) in reading order.

    Args:
      spec: how a picture becomes patches; has a `native`.
    """

    def __init__(self, spec: ImageSpec):
        self.spec, self.native = spec, spec.native
        self.packer = Packer(spec.max_patches, spec.native)
        self.grids: list[Grid] = []
        self.steps: list[float] = []
        self.places: list[tuple[Place, ...]] = []

    def add(self, image: Image) -> Span:
        """The vision rows that a picture or a clip is the first in, and the visual token at each of its positions.

        Raises:
          ImageError: a picture too narrow, or too large for a vision row.
        """
        clip = image.source if isinstance(image.source, Clip) else None
        size = shown_size(image, self.spec.max_pixels)
        rows, cols = self.native.grid(*size, self.spec.patch, self.spec.max_patches, taken(image))
        times = 1 if clip is None else -(-len(clip.indices) // self.native.frames)
        self.grids.append((times, rows, cols))
        self.steps.append(1.0 if clip is None else step(clip, self.native.frames, self.native.rate))
        index, places, new = self.packer.add(self.grids[-1])
        self.places.append(places)
        return Span(new, index)

    def finished(self, encoded: Encoded) -> Encoded:
        """The conversation with what its pictures' shapes say of it: where their parts stand, and every position."""
        axes = positions(len(encoded.tokens), encoded.spans, self.grids, self.native.merge, self.steps)
        return dataclasses.replace(encoded, places=tuple(self.places), axes=axes)


def step(clip: Clip, frames: int, rate: float | None) -> float:
    """How many time positions lie between two of a clip's pictures of `frames` frames each.

    Args:
      rate: time positions a second; None counts the pictures.
    """
    return 1.0 if rate is None else rate * frames * clip.duration / len(clip.indices)
