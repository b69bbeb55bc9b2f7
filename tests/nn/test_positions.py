"""Rotary positions see distances only; resized position tables. The numbers of the torch library: tests/parity."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.nn.positions import resize_positions, rotary, rotate_half


def test_only_the_distance_counts():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 32)), jnp.float32)

    def score(a, b):
        at = lambda x, p: rotate_half(x, *rotary(jnp.asarray([[p]]), 32, 10000.0))  # noqa: E731
        return float((at(q, a) * at(k, b)).sum())

    assert score(3, 1) == pytest.approx(score(10, 8), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_resize_keeps_an_equal_grid_bit_for_bit():
    table = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(jnp.asarray(table), 4, 4), table)


@pytest.mark.parametrize("grid", [8, 32])
def test_resize_keeps_a_ramp_a_ramp(grid):
    """Rows and columns are not mixed up, and centres of cells fall where they should (edges are bent)."""
    centres = lambda n: (np.arange(n) + 0.5) / n  # noqa: E731
    ramp = lambda n: np.add.outer(centres(n), 10 * centres(n)).reshape(n * n, 1).astype(np.float32)  # noqa: E731
    got = np.asarray(resize_positions(jnp.asarray(ramp(16)), grid, 16)).reshape(grid, grid)
    inner = slice(grid // 4, -(grid // 4))
    np.testing.assert_allclose(got[inner, inner], ramp(grid).reshape(grid, grid)[inner, inner], atol=1e-5)
