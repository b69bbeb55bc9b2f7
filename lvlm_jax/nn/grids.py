"""A learned position table read at other grids: each picture of a vision row at its own.

A resize is separable, and its weights depend on (place, new side, old side) alone. So they are computed from the
patches' positions where they are needed: one compiled program serves pictures of every size and shape.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lvlm_jax.shapes import Array, Float, Int

Weights = Callable[[Array, Array, int, float], Array]
"""(place, new side, old side, offset) -> the share of each old place, [..., old side]."""


def picture_grids(positions: Int[Array, "N P 2"], segments: Int[Array, "N P"]) -> Int[Array, "N P 2"]:
    """(rows, columns) of the picture that each patch is in: one past the last position of its segment."""
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.max(jnp.where(same[..., None], positions[:, None], 0), axis=2) + 1


def resized(
    table: Float[Array, "S D"],
    positions: Int[Array, "N P 2"],
    segments: Int[Array, "N P"],
    grid: int,
    kind: str,
    offset: float = 0.0,
) -> Float[Array, "N P D"]:
    """What a patch reads of a table of `grid` x `grid` places, resized to its picture's own grid; float32.

    Args:
      kind: a key of `RESIZES`.
      offset: added to the new side where places are compared (DINOv2's own code has 0.1); of "cubic" alone.
    """
    sides = picture_grids(positions, segments)
    weights = RESIZES[kind]
    rows = weights(positions[..., 0], sides[..., 0], grid, offset)
    cols = weights(positions[..., 1], sides[..., 1], grid, offset)
    both = (rows[..., :, None] * cols[..., None, :]).reshape(*positions.shape[:2], grid * grid)
    # The table is not to be rounded: where no resize is needed this is to be a plain look-up.
    return jnp.einsum("NPS,SD->NPD", both, table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _cubic(x: Array, a: float) -> Array:
    """Keys' cubic kernel: 1 at 0, 0 at 1 and from 2 on."""
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))


def _antialiased(kernel: Callable[[Array], Array]) -> Weights:
    """A kernel that grows with the step when the table shrinks; what falls outside the table is left out."""

    def weights(place: Array, side: Array, grid: int, offset: float) -> Array:
        step = grid / side.astype(jnp.float32)
        centre = step * (place + 0.5)
        away = jnp.arange(grid) + 0.5 - centre[..., None]
        share = kernel(away / jnp.maximum(step, 1.0)[..., None])
        return share / share.sum(-1, keepdims=True)

    return weights


def _cubic_weights(place: Array, side: Array, grid: int, offset: float) -> Array:
    """Four old places around the new one, however far apart the new ones are; the table's edge is repeated."""
    centre = grid / (side.astype(jnp.float32) + offset) * (place + 0.5) - 0.5
    first = jnp.floor(centre)
    out = jnp.zeros((*place.shape, grid), jnp.float32)
    for k in (-1.0, 0.0, 1.0, 2.0):
        old = jnp.clip(first + k, 0, grid - 1)
        out += _cubic(centre - first - k, -0.75)[..., None] * (jnp.arange(grid) == old[..., None])
    return out


def _linear_corners_weights(place: Array, side: Array, grid: int, offset: float) -> Array:
    """Two old places around the new one; the corners of both grids are the same places."""
    centre = place.astype(jnp.float32) * (grid - 1) / jnp.maximum(side - 1, 1).astype(jnp.float32)
    return jnp.maximum(1 - jnp.abs(jnp.arange(grid) - centre[..., None]), 0.0)


RESIZES: dict[str, Weights] = {
    "linear_antialias": _antialiased(lambda x: jnp.maximum(1 - jnp.abs(x), 0.0)),
    "linear_corners": _linear_corners_weights,
    "cubic": _cubic_weights,
    "cubic_antialias": _antialiased(lambda x: _cubic(x, -0.5)),
}
"""How a table is resized: SigLIP 2's, Qwen3-VL's, DINOv2's, and that of DINOv2 with registers."""
