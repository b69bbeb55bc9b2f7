"""Rotary positions see distances only. The numbers of the torch library: tests/parity."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.nn.positions import rotary, rotate_half


def test_only_the_distance_counts():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 32)), jnp.float32)

    def score(a, b):
        at = lambda x, p: rotate_half(x, *rotary(jnp.asarray([[p]]), 32, 10000.0))  # noqa: E731
        return float((at(q, a) * at(k, b)).sum())

    assert score(3, 1) == pytest.approx(score(10, 8), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
