"""Two-step retrieval: who is matched, and the order that comes of it."""

import jax.numpy as jnp
import numpy as np

from lvlm_jax.evaluate.rerank import rerank


def test_the_best_are_matched_and_both_scores_count():
    scores = jnp.array([[0.9, 0.1, 0.8, 0.5], [0.2, 0.7, 0.3, 0.6]])
    logits = np.array([[0.0, 99.0, 0.5, 1.0], [9.0, -2.0, 9.0, 0.0]])  # the 99 and both 9s are never asked for
    asked = []

    def match(candidates):
        asked.append(np.asarray(candidates).tolist())
        return jnp.take_along_axis(jnp.asarray(logits, jnp.float32), candidates, 1)

    order, together = rerank(scores, match, k=3)
    assert asked == [[[0, 2, 3], [1, 3, 2]]]
    assert order.tolist() == [[3, 2, 0], [2, 3, 1]]
    np.testing.assert_allclose(together, [[1.5, 1.3, 0.9], [9.3, 0.6, -1.3]], rtol=1e-6)


def test_fewer_candidates_than_are_matched():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    extra = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)), jnp.float32)
    order, together = rerank(scores, lambda candidates: jnp.take_along_axis(extra, candidates, 1))
    np.testing.assert_array_equal(order, np.argsort(-(scores + extra), axis=1))
    np.testing.assert_allclose(together, -np.sort(-(scores + extra), axis=1), rtol=1e-6)
