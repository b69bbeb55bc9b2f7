"""Patch merger: neighbouring patches become one token, which two dense layers bring to the language model's width.

Patches come so ordered that the neighbours of a token follow one another (`processing.native`), so that to merge them
is a reshape, whatever the picture's shape. Source: Qwen2-VL (arXiv 2409.12191); Qwen3-VL (arXiv 2511.21631) for taps.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.linear import linear
from lvlm_jax.nn.mlp import ACTIVATIONS
from lvlm_jax.nn.norms import NORMS
from lvlm_jax.shapes import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergerConfig:
    """Norm of each patch, neighbours side by side in one token, dense, GELU, dense.

    neighbours: patches of a token. norm: a key of `nn.norms.NORMS`. taps: so many earlier layers of the tower stand
    behind the last in each patch's features; each has a merger of its own, whose norm is behind the joining
    (`fusion.deepstack` says where they go).
    """

    neighbours: int = 4
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    taps: int = 0

    def __post_init__(self) -> None:
        if self.neighbours < 1 or self.taps < 0:
            raise ValueError(
                f"neighbours={self.neighbours}, taps={self.taps}: at least one patch makes a token, and there are no "
                "fewer than 0 earlier layers"
            )

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row, from the tower's features.

        Raises:
          ValueError: features that `neighbours` does not divide.
        """
        if features % self.neighbours:
            raise ValueError(
                f"patch merger: {features} patches of a vision row do not divide into tokens of {self.neighbours}; "
                "choose a multiple as the tower's max_patches"
            )
        return features // self.neighbours

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return Mergers(width, self.neighbours, self.norm, self.norm_eps, self.taps, dtype)


class Merger(nn.Module):
    """One merger; `late` has its norm behind the joining of neighbours."""

    width: int
    neighbours: int
    norm: str
    norm_eps: float
    late: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N Q F"]:
        rows, patches, width = x.shape
        wide = self.neighbours * width
        norm = NORMS[self.norm](self.norm_eps, self.dtype, name="norm")
        joined = lambda x: x.reshape(rows, patches // self.neighbours, wide)  # noqa: E731
        x = norm(joined(x)) if self.late else joined(norm(x))
        x = ACTIVATIONS["gelu"](linear(wide, ("embed", "mlp"), use_bias=True, dtype=self.dtype, name="linear_1")(x))
        return linear(self.width, ("mlp", "embed"), use_bias=True, dtype=self.dtype, name="linear_2")(x)


class Mergers(nn.Module):
    """The merger of the last layer, and one for each tapped one.

    Parameters: ``merger``; ``taps_0``, ``taps_1`` ... where there are some.
    """

    width: int
    neighbours: int
    norm: str = "layer"
    norm_eps: float = 1e-6
    taps: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N Q F"]:
        """Features of the last layer and of the tapped ones -> their tokens, in the same order along the last axis."""
        last, *earlier = jnp.split(x, 1 + self.taps, axis=-1)
        sizes = (self.width, self.neighbours, self.norm, self.norm_eps)
        out = [Merger(*sizes, dtype=self.dtype, name="merger")(last)]
        out += [Merger(*sizes, late=True, dtype=self.dtype, name=f"taps_{i}")(tap) for i, tap in enumerate(earlier)]
        return jnp.concatenate(out, axis=-1)
