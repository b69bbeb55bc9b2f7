"""Retrieval in two steps: a cheap score of every pair, then a dear one of the best."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lvlm_jax.shapes import Array, Float, Int


def rerank(
    scores: Float[Array, "N M"], match: Callable[[Int[Array, "N K"]], Float[Array, "N K"]], k: int = 128
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """The K = min(k, M) best candidates of each query, ordered by both scores together.

    Source: BLIP-2 (arXiv 2301.12597), section 4.4: contrastive scores choose 128, a matching score is added.

    Args:
      scores: contrastive score of each query with each candidate, not divided by a temperature.
      match: for candidates of each query (their numbers), the matching logit of each.
      k: how many candidates of each query are matched.

    Returns:
      (numbers of the candidates, best first; sum of both scores of each). All others come behind them.
    """
    best, candidates = jax.lax.top_k(scores, min(k, scores.shape[1]))
    together = best + match(candidates)
    order = jnp.argsort(-together, axis=1, stable=True)
    return jnp.take_along_axis(candidates, order, 1), jnp.take_along_axis(together, order, 1)
