"""Rotary positions see distances only; ALiBi's slopes. The numbers of the torch library: tests/parity."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.nn.positions import alibi, alibi_slopes, rotary, rotate_half


def test_only_the_distance_counts():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 32)), jnp.float32)

    def score(a, b):
        at = lambda x, p: rotate_half(x, *rotary(jnp.asarray([[p]]), 32, 10000.0))  # noqa: E731
        return float((at(q, a) * at(k, b)).sum())

    assert score(3, 1) == pytest.approx(score(10, 8), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_alibi_falls_with_the_distance_on_either_side():
    """Eight heads halve from 1/2 to 1/256 (the paper's section 3); others take turns among the next power of two's."""
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    bias = alibi(jnp.array([3, 4]), 6, 2)
    np.testing.assert_allclose(bias[0], [[-n / 16 for n in row] for row in ([3, 2, 1, 0, 1, 2], [4, 3, 2, 1, 0, 1])])
