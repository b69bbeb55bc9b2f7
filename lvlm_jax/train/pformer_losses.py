"""What a P-Former is trained with, and what it then asks of a Q-Former.

Stage 0 adds up three losses (`losses.total`): how well the language model writes the sentence from the prompt, which is
`losses.language_loss` of the caller's decoder, `vocabulary_loss` and `sentence_loss`. Afterwards `alignment_loss` joins
the losses of a Q-Former. Source: BLIText (arXiv 2307.07063), section 3, and its repository.
"""

import jax
import jax.numpy as jnp

from lvlm_jax.shapes import Array, Float, Int
from lvlm_jax.train.losses import Real, Sums, retrieval_loss

Mean = tuple[Float[Array, ""], Float[Array, ""]]
"""(loss sum, weight sum)."""

ALIGNMENT = {"stage 1": 10.0, "stage 2": 100.0}
"""The weight of `alignment_loss` beside BLIP-2's losses of each stage."""


def mask_words(
    key: jax.Array, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], mask_id: int, share: float = 0.25
) -> Int[Array, "B T"]:
    """Texts with about `share` of their tokens hidden behind [MASK], but never the first, [CLS], nor padding."""
    hidden = jax.random.bernoulli(key, share, tokens.shape) & (segments > 0) & (jnp.arange(tokens.shape[1]) > 0)
    return jnp.where(hidden, mask_id, tokens)


def nearest(x: Float[Array, "B Q D"], table: Float[Array, "V D"], chunk: int = 4096) -> Int[Array, "B Q"]:
    """The row of a table that each vector is nearest to; the first where several are. `chunk` rows at a time."""
    x, table = (jax.lax.stop_gradient(part.astype(jnp.float32)) for part in (x, table))
    words, chunk = len(table), min(chunk, len(table))

    def look(i: Array, best: tuple) -> tuple:
        start = jnp.minimum(i * chunk, words - chunk)  # the last chunk looks at some rows again
        part = jax.lax.dynamic_slice_in_dim(table, start, chunk)
        far = jnp.square(part).sum(-1) - 2 * jnp.einsum("BQD,VD->BQV", x, part, precision="highest")
        least = far.min(-1)
        nearer = least < best[0]
        return jnp.where(nearer, least, best[0]), jnp.where(nearer, start + far.argmin(-1).astype(jnp.int32), best[1])

    none = jnp.full(x.shape[:2], jnp.inf), jnp.zeros(x.shape[:2], jnp.int32)
    return jax.lax.fori_loop(0, -(-words // chunk), look, none)[1]


def vocabulary_loss(prompt: Float[Array, "B Q D"], table: Float[Array, "V D"], real: Real = None) -> Mean:
    """Mean squared distance of each prompt vector from the language model's word that is nearest to it.

    Args:
      table: word embeddings of the language model; they get no gradient.
      real: False for rows that only fill up the batch.
    """
    return _squares(prompt, table[nearest(prompt, table)], real)


def sentence_loss(
    sentence: Float[Array, "B E"],
    temperature: Float[Array, ""] | float,
    real: Real = None,
    *,
    smoothing: float = 0.1,
    gathered: bool = True,
) -> Sums:
    """Contrast of each sentence with all of the batch, itself being the answer.

    Args:
      sentence: unit vectors. gathered: see `qformer_losses.itc_loss`.
    """
    scores = sentence @ (sentence if gathered else jax.lax.stop_gradient(sentence)).T / temperature
    return retrieval_loss(scores, scores, None, real, smoothing)


def alignment_loss(projected: Float[Array, "B Q D"], prompt: Float[Array, "B Q D"], real: Real = None) -> Mean:
    """Mean squared distance of a Q-Former's visual tokens from the prompt of their caption, which gets no gradient.

    Args:
      projected: queries in the language model's width: what the connector gives.
      prompt: of a frozen P-Former, of the unmasked caption.
    """
    return _squares(projected, prompt, real)


def _squares(x: Float[Array, "B Q D"], aim: Float[Array, "B Q D"], real: Real) -> Mean:
    distance = jnp.square(x.astype(jnp.float32) - jax.lax.stop_gradient(aim.astype(jnp.float32))).mean((1, 2))
    weights = jnp.ones(len(x)) if real is None else jnp.asarray(real).astype(jnp.float32)
    return (distance * weights).sum(), weights.sum()
