"""Retrieval in two steps: a cheap score of every pair, then a dear one of the best."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lvlm_jax.models.image_text import ImageText
from lvlm_jax.shapes import Array, Float, Int, Params


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


def match_pairs(
    model: ImageText,
    params: Params,
    features: Float[Array, "M P D"],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    images: Int[Array, "N K"],
    texts: Int[Array, "N K"],
) -> Float[Array, "N K"]:
    """Matching logit of many pairs, K at a time: what `rerank` asks.

    Args:
      features: of all pictures (`ImageText.features`); tokens, segments: of all texts.
      images, texts: the numbers of each pair's two. For the texts of each picture these are the picture's own number,
        K times, and `rerank`'s candidates.
    """

    def row(pair: tuple[Array, Array]) -> Array:
        image, text = pair
        return model.apply({"params": params}, features[image], tokens[text], segments[text], method="match")[:, 1]

    return jax.lax.map(row, (images, texts))
