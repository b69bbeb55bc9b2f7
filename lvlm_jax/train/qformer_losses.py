"""What a Q-Former is pre-trained with: image-text contrast, image-text matching, image-grounded text generation.

All rows of the global batch are compared: what LAVIS gathers over devices is one array here. Pure functions that return
sums as `train.losses`. Source: BLIP-2 (arXiv 2301.12597), section 3.2; what the paper leaves open is as in LAVIS.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.mesh import constrain
from lvlm_jax.models.image_text import ImageText
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Array, Bool, Float, Int, Params
from lvlm_jax.train.losses import Pairs, Real, Sums, language_loss, matches, pairs_of, retrieval_loss

SMOOTHING = 0.1
"""LAVIS's label smoothing, of the contrast and of the words alike."""


def itc_scores(image: Float[Array, "N Q E"], text: Float[Array, "B E"]) -> Float[Array, "N B"]:
    """How well each picture fits each text: the best of its queries, by the product of unit vectors."""
    products = jnp.einsum("NQE,BE->NBQ", image, text, preferred_element_type=jnp.float32)
    return constrain(products, ("batch", None, None)).max(-1)


def itc_loss(
    image: Float[Array, "B Q E"],
    text: Float[Array, "B E"],
    temperature: Float[Array, ""] | float,
    same: Pairs | None = None,
    real: Real = None,
    *,
    smoothing: float = SMOOTHING,
    gathered: bool = True,
) -> Sums:
    """Image-text contrast, both ways, over all pairs of the batch.

    Args:
      image, text: `ImageText.embed_images` and `embed_text` of the same rows.
      same, real: as `losses.contrastive_loss`'s; rows of one image id share their target, as in LAVIS's fine-tuning.
      gathered: whether the side that a row is compared with gets a gradient too. LAVIS's on more than one device gets
        none, since its gather has no backward pass: False is that.
    """
    far = (lambda x: x) if gathered else jax.lax.stop_gradient
    to_text = itc_scores(image, far(text)) / temperature
    to_image = itc_scores(far(image), text).T / temperature
    return retrieval_loss(to_text, to_image, same, real, smoothing)


def hard_negatives(
    key: jax.Array, scores: Float[Array, "B B"], same: Pairs | None = None, real: Real = None
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """(a row that does not match each row, whether there is one), drawn by the softmax of its scores.

    Args:
      scores: of each row with all, divided by the temperature; turned for the other side.
      same, real: as `losses.contrastive_loss`'s; matches and rows that only fill up the batch are never drawn.
    """
    allowed = pairs_of(real, len(scores))[0] & ~matches(same, len(scores))
    drawn = jax.random.categorical(key, jnp.where(allowed, scores, -jnp.inf), axis=1)
    return drawn, allowed.any(1)


def three_groups(
    features: Float[Array, "B P D"],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    other_image: Int[Array, "B"],
    other_text: Int[Array, "B"],
) -> tuple[Float[Array, "N P D"], Int[Array, "N T"], Int[Array, "N T"]]:
    """Three pairs a row, one after another: its own, its text with another picture, its picture with another text.

    Negatives come from anywhere in the batch, and the gradient of a picture goes back to where it came from.
    """

    def three(own: Array, image_wise: Array, text_wise: Array) -> Array:
        together = jnp.stack([own, image_wise, text_wise], axis=1).reshape(-1, *own.shape[1:])
        return constrain(together, ("batch",) + (None,) * (own.ndim - 1))

    words = lambda x: three(x, x, x[other_text])  # noqa: E731
    return three(features, features[other_image], features), words(tokens), words(segments)


def itm_loss(
    logits: Float[Array, "N 2"], image_found: Bool[Array, "B"], text_found: Bool[Array, "B"], real: Real = None
) -> Sums:
    """Image-text matching of `three_groups`: cross-entropy of (no match, match).

    Args:
      logits: `ImageText.match` of the N = 3B pairs.
      image_found, text_found: whether `hard_negatives` had one to draw; a pair that is none is in no loss.
      real: False for rows that only fill up the batch.
    """
    real = jnp.ones_like(image_found) if real is None else jnp.asarray(real)
    weights = jnp.stack([real, real & image_found, real & text_found], 1).reshape(-1).astype(jnp.float32)
    labels = jnp.tile(jnp.array([1, 0, 0]), len(real))
    own = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], 1)[:, 0]
    return -(own * weights).sum(), weights.sum(), ((logits.argmax(1) == labels) * weights).sum()


def itg_loss(
    hidden: Float[Array, "B T F"],
    kernel: Float[Array, "F V"],
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    smoothing: float = SMOOTHING,
    **options: Any,
) -> Sums:
    """Image-grounded text generation: the next word from the queries and the words before.

    Args:
      hidden, kernel: of `ImageText.caption`, which read `captions(tokens, ...)`.
      tokens, segments: the texts; padding is no target.
      smoothing: share of the target that all words have alike.
      options: `losses.language_loss`'s.
    """
    weights = (segments > 0).astype(jnp.float32)
    loss, weight, correct = language_loss(hidden, kernel, tokens, weights, **options)
    # Smoothing takes from the logit of the target what it gives to the mean of all: no second softmax.
    apart = kernel.T[tokens[:, 1:]] - kernel.mean(1)
    gap = jnp.einsum("BTF,BTF->BT", hidden[:, :-1], apart.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return loss + smoothing * jnp.where(weights[:, 1:] > 0, gap, 0.0).sum(), weight, correct


def captions(tokens: Int[Array, "B T"], start_id: int) -> Int[Array, "B T"]:
    """Texts to be generated: [DEC], the word `start_id`, instead of the first token, [CLS]."""
    return tokens.at[:, 0].set(start_id)


def pretraining_losses(
    model: ImageText,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    start_id: int,
    same: Pairs | None = None,
    gathered: bool = True,
    smoothing: float = SMOOTHING,
    **options: Any,
) -> dict[str, Sums]:
    """The three losses of a batch of pairs: ``itc``, ``itm``, ``itg``; `losses.total` adds up their means.

    The tower runs once, the Q-Former over pictures with their texts (contrast and generation), over texts alone
    (contrast) and over three pairs a row (matching).

    Args:
      batch: one text a row, one picture a text; a row without a text only fills the batch up.
      key: draws the negatives.
      start_id: see `captions`. same, gathered, smoothing: see `itc_loss`. options: `losses.language_loss`'s.

    Raises:
      ValueError: a model without what pre-training needs.
    """
    if not model.config.pretrains:
        raise ValueError("this model has no word head and no temperature to train; build it with pretrains=True")
    run = lambda method, *args: model.apply({"params": params}, *args, method=method)  # noqa: E731
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segments)
    real, temperature = segments.max(1) > 0, params["temperature"]
    features = run("features", batch)
    image, hidden, kernel = run("caption", features, captions(tokens, start_id), segments)
    text = run("embed_text", tokens, segments)
    scores = jax.lax.stop_gradient(itc_scores(image, text) / temperature)
    pairs = matches(same, len(scores))
    of_texts, of_images = jax.random.split(key)
    other_image, image_found = hard_negatives(of_texts, scores.T, pairs.T, real)
    other_text, text_found = hard_negatives(of_images, scores, pairs, real)
    groups = three_groups(features, tokens, segments, other_image, other_text)
    return {
        "itc": itc_loss(image, text, temperature, pairs, real, smoothing=smoothing, gathered=gathered),
        "itm": itm_loss(run("match", *groups), image_found, text_found, real),
        "itg": itg_loss(hidden, kernel, tokens, segments, smoothing=smoothing, **options),
    }
