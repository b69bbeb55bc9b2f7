"""Losses as pure functions that return (loss_sum, weight_sum, correct_sum): sums, so that microbatches add up."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.mesh import constrain
from lvlm_jax.nn.attention import soft_cap
from lvlm_jax.nn.norms import unit
from lvlm_jax.shapes import Array, Bool, Float, Int
from lvlm_jax.vision.vq import Reading

Sums = tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]


def language_loss(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "D V"],
    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
    weights: Float[Array, "B T"] | Float[np.ndarray, "B T"],
    *,
    chunk: int = 256,
    skip_unlabelled: bool = True,
    head_trained: bool = True,
    shards: int = 1,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Sums:
    """Weighted next-token cross-entropy that never holds a B x T x V array.

    Position t predicts tokens[t+1] with weights[t+1]; `weights` is the loss weight of a token as a target. Loss and
    gradient are computed in one pass over chunks of `chunk` positions of every row. With `skip_unlabelled` the labelled
    positions of each row are moved to its front (within the row, so nothing leaves a data shard) and only as many
    chunks run as the fullest row needs; without it the number of chunks is static, for pods whose steps should all take
    equally long. head_kernel: an untied head, or the embedding table transposed. head_trained=False: the gradient of
    the head is not computed (it comes back as zero). shards: over how many data shards the rows lie; each then adds up
    its own gradient of the head, and one sum over shards follows the loop instead of one for every chunk. softcap: the
    decoder's `final_softcap`, which bends the logits (see `nn.attention.soft_cap`). z_loss: adds so many times the
    square of log Z, the logarithm of the softmax's denominator, which keeps logits from drifting (PaLM, arXiv
    2204.02311; Chameleon, arXiv 2405.09818, takes 1e-5).

    Products run in the dtype of `hidden`; logits, sums and the head's gradient are float32. Ids are checked where they
    are made, on the host; a labelled id outside [0, V) makes the loss NaN here. `weights` get no gradient.

    Returns:
      Sum of weight times loss; sum of weights; sum of weights where the likeliest token is the target.
    """
    after = ((0, 0), (0, 1))
    targets = jnp.pad(jnp.asarray(tokens)[:, 1:], after)
    shifted = jnp.pad(jnp.asarray(weights, jnp.float32)[:, 1:], after)
    if tokens.shape[0] % shards:
        raise ValueError(f"{tokens.shape[0]} rows do not divide over shards={shards}")
    shards = shards if head_trained else 0
    return _cross_entropy(chunk, skip_unlabelled, shards, softcap, z_loss, hidden, head_kernel, targets, shifted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _cross_entropy(chunk, skip, shards, softcap, z_loss, hidden, kernel, targets, weights):
    return _sweep(chunk, skip, softcap, z_loss, hidden, kernel, targets, weights, gradient=False, shards=0)[0]


def _forward(chunk, skip, shards, softcap, z_loss, hidden, kernel, targets, weights):
    sums, grads = _sweep(chunk, skip, softcap, z_loss, hidden, kernel, targets, weights, gradient=True, shards=shards)
    return sums, grads


def _backward(chunk, skip, shards, softcap, z_loss, grads, cotangents):
    dhidden, dkernel = grads
    scale = cotangents[0]
    dhidden = (dhidden.astype(jnp.float32) * scale).astype(dhidden.dtype)
    return dhidden, None if dkernel is None else (dkernel * scale).astype(dkernel.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _scored(logits, y, w, softcap, z_loss, gradient):
    """(loss, correct, slope by the logits or None) of some positions: their logits before the cap, targets, weights."""
    if softcap is not None:
        logits = soft_cap(logits, softcap)
    top = logits.max(-1)
    exps = jnp.exp(logits - top[..., None])
    mass = exps.sum(-1)
    own = jnp.take_along_axis(logits, y[..., None], 2)[..., 0]
    # where, not a product: an infinite logit at an unlabelled position must not become 0 * inf.
    log_z = jnp.log(mass) + top
    loss = jnp.where(w > 0, w * (log_z - own + z_loss * jnp.square(log_z)), 0.0).sum()
    correct = jnp.where(own >= top, w, 0.0).sum()
    if not gradient:
        return loss, correct, None
    hot = y[..., None] == jax.lax.broadcasted_iota(y.dtype, (1, 1, logits.shape[-1]), 2)
    probs = (1 + 2 * z_loss * log_z)[..., None] * exps / mass[..., None]
    slope = jnp.where(w > 0, w, 0.0)[..., None] * (probs - hot)
    if softcap is not None:
        slope *= 1 - (logits / softcap) ** 2  # the slope of the cap itself
    return loss, correct, jnp.where(w[..., None] > 0, slope, 0.0)


def _sweep(chunk, skip, softcap, z_loss, hidden, kernel, targets, weights, *, gradient, shards):
    """(sums, (dhidden, dkernel or None) or None) by a loop over chunks of positions; shards=0: no dkernel."""
    (B, T, D), V = hidden.shape, kernel.shape[1]
    chunk = min(chunk, T)
    total = -(-T // chunk)
    order = jnp.argsort(weights <= 0, axis=1, stable=True) if skip else jnp.broadcast_to(jnp.arange(T), (B, T))
    fill = ((0, 0), (0, total * chunk - T))
    places = jnp.pad(order, fill)
    target, weight = (jnp.pad(jnp.take_along_axis(x, order, 1), fill) for x in (targets, weights))
    work = kernel.astype(hidden.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one_chunk(i, carry):
        loss, correct, dhidden, dkernel = carry
        at, y, w = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1) for x in (places, target, weight))
        h = jax.vmap(lambda row, index: row[index])(hidden, at)
        more, right, slope = _scored(dot("btd,dv->btv", h, work), y, w, softcap, z_loss, gradient)
        loss, correct = loss + more, correct + right
        if gradient:
            slope = slope.astype(hidden.dtype)
            dh = dot("btv,dv->btd", slope, work).astype(hidden.dtype)
            dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, dh, i * chunk, 1)
            if shards:
                h, slope = (x.reshape(shards, B // shards, chunk, -1) for x in (h, slope))
                dkernel += dot("sbtd,sbtv->sdv", h, slope)
        return loss, correct, dhidden, dkernel

    zero = jnp.zeros((), jnp.float32)
    carry = (
        zero,
        zero,
        jnp.zeros((B, total * chunk, D), hidden.dtype) if gradient else None,
        jnp.zeros((shards, D, V), jnp.float32) if shards else None,
    )
    used = -(-(weights > 0).sum(1).max() // chunk) if skip else total
    loss, correct, dhidden, dkernel = jax.lax.fori_loop(0, used, one_chunk, carry)
    sums = loss, weights.sum(), correct
    if not gradient:
        return sums, None
    if skip:
        dhidden = jax.vmap(lambda row, index: row[index])(dhidden, jnp.argsort(order, axis=1))
    dhidden = dhidden[:, :T]
    if dkernel is None:
        return sums, (dhidden, None)
    # Cut like the head itself, so that devices add up their own part alone, and before the backward pass goes on: else
    # every device holds a whole float32 head through it.
    dkernel = constrain(dkernel.sum(0).astype(kernel.dtype), ("embed", "vocab"))
    return sums, jax.lax.optimization_barrier((dhidden, dkernel))


def tokenizer_loss(
    pixels: Float[Array, "N tall wide 3"] | Float[np.ndarray, "N tall wide 3"],
    read: Reading,
    real: Bool[Array, "N"] | Bool[np.ndarray, "N"] | None = None,
    *,
    distance: Literal["l1", "l2"] = "l1",
    commitment: float = 0.25,
    codebook: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What a picture tokenizer is trained by (van den Oord et al., arXiv 1711.00937, equation 3).

    The distance of pixels to what is written back, `codebook` times the squared distance of codebook rows to latents
    that stay, and `commitment` times that of latents to rows that stay; each a mean over a picture. The perceptual and
    adversarial terms of VQGAN are not here. real: False for pictures that only fill up the batch; default all are real.

    Returns:
      Sum over pictures, number of pictures, and each term's own sum ("reconstruction", "commitment", "codebook").
    """
    real = jnp.ones(len(pixels), bool) if real is None else jnp.asarray(real)
    mean = lambda x: jnp.where(real, x.reshape(x.shape[0], -1).mean(1), 0.0).sum()  # noqa: E731
    away = {"l1": jnp.abs, "l2": jnp.square}[distance](read.made - pixels)
    still = jax.lax.stop_gradient
    terms = {
        "reconstruction": mean(away),
        "commitment": mean(jnp.square(read.latents - still(read.vectors))),
        "codebook": mean(jnp.square(read.vectors - still(read.latents))),
    }
    loss = terms["reconstruction"] + commitment * terms["commitment"] + codebook * terms["codebook"]
    return loss, real.sum(dtype=jnp.float32), terms


Pairs = Bool[Array, "B B"] | Bool[np.ndarray, "B B"] | Int[Array, "B"] | Int[np.ndarray, "B"]
Real = Bool[Array, "B"] | Bool[np.ndarray, "B"] | None


def contrastive_loss(
    image: Float[Array, "B D"],
    text: Float[Array, "B D"],
    scale: Float[Array, ""] | float,
    same: Pairs | None = None,
    real: Real = None,
) -> Sums:
    """Symmetric InfoNCE in which all rows with the same caption share the target mass.

    CLIP's loss (Radford et al. 2021) when every caption differs. With few distinct captions the plain loss punishes
    correct matches; here row i aims at 1/n for each of its n equal captions. same: caption ids [B], or which image
    matches which text [B, B]; None means row i matches text i alone. scale: exp of the learnt logit scale. real: False
    for rows that only fill up the batch, which are in nothing; default all are real. Features are normalised here.

    Returns:
      Sum over rows of the mean of both directions; real rows; images whose likeliest text is a match.
    """
    logits = scale * unit(image) @ unit(text).T
    return retrieval_loss(logits, logits.T, same, real)


def retrieval_loss(
    to_text: Float[Array, "B B"],
    to_image: Float[Array, "B B"],
    same: Pairs | None = None,
    real: Real = None,
    smoothing: float = 0.0,
) -> Sums:
    """Cross-entropy of finding each image's texts and each text's images, by scores of every pair.

    `to_text` has an image a row, `to_image` a text a row: the same scores turned, or those of two rules of gradient.
    smoothing: share of the target that all real rows have alike, matches or not. The rest as `contrastive_loss`.
    """
    both, count = pairs_of(real, len(to_text))
    match = matches(same, len(to_text)) & both
    loss = _find(to_text, match, both, smoothing) + _find(to_image, match.T, both, smoothing)
    return loss / 2, count, _retrieved(jnp.where(both, to_text, -1e9), match)


def _find(logits: Float[Array, "B B"], match: Array, both: Array, smoothing: float) -> Float[Array, ""]:
    """Sum over rows of the cross-entropy with a target that the row's matches share."""
    share = lambda x: x / jnp.maximum(x.sum(1, keepdims=True), 1)  # noqa: E731
    target = share(match.astype(jnp.float32))
    if smoothing:
        target = (1 - smoothing) * target + smoothing * share(both.astype(jnp.float32))
    return -(target * jax.nn.log_softmax(jnp.where(both, logits, -1e9), axis=1)).sum()


def sigmoid_loss(
    image: Float[Array, "B D"],
    text: Float[Array, "B D"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    same: Pairs | None = None,
    real: Real = None,
) -> Sums:
    """SigLIP's pairwise loss (Zhai et al. 2023): -log sigmoid(+-logit) over all pairs, summed over texts.

    logit = scale * cos(image, text) + bias; scale starts at 10 (exp of ln 10), bias at -10. same, real: see
    `contrastive_loss`; every matching pair is a positive.

    Returns:
      Sum over images; real rows; images whose likeliest text is a match.
    """
    both, count = pairs_of(real, len(image))
    logits = scale * unit(image) @ unit(text).T + bias
    match = matches(same, len(image)) & both
    loss = -jnp.where(both, jax.nn.log_sigmoid(jnp.where(match, logits, -logits)), 0.0).sum()
    return loss, count, _retrieved(jnp.where(both, logits, -1e9), match)


def pairs_of(real: Any, rows: int) -> tuple[Bool[Array, "B B"], Float[Array, ""]]:
    """(pairs of two real rows, how many rows are real)."""
    real = jnp.ones(rows, bool) if real is None else jnp.asarray(real)
    return real[:, None] & real[None, :], real.sum(dtype=jnp.float32)


def matches(same: Pairs | None, rows: int) -> Bool[Array, "B B"]:
    """Which image matches which text: from that matrix, from equal ids, or row by row alone."""
    if same is None:
        return jnp.eye(rows, dtype=bool)
    same = jnp.asarray(same)
    return same if same.ndim == 2 else same[:, None] == same[None, :]


def _retrieved(logits: Float[Array, "B B"], match: Array) -> Float[Array, ""]:
    return jnp.take_along_axis(match.astype(jnp.float32), logits.argmax(1)[:, None], 1).sum()


def total(*parts: tuple[Float[Array, ""], ...]) -> Float[Array, ""]:
    """Several losses as one number: the sum of the means of (loss sum, weight sum, ...)."""
    return sum(part[0] / jnp.where(part[1] > 0, part[1], 1.0) for part in parts)
