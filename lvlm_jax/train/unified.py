"""What a training step minimises for a unified token model: its picture tokenizer first, then text and pictures alike.

Both are `step.LossFn`s over a `Batch`, for `step.make_train_step` and `loop.fit`. Against norms that drift (Chameleon,
arXiv 2405.09818, section 2.3) stand `DecoderConfig.qk_norm` and `.order`, the z-loss here, and the trainer's clipping,
warm-up and skipped spikes (`stages.SpikePolicy`); Chameleon 7B's dropout is left out.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.models.unified import Unified
from lvlm_jax.processing.schema import Batch
from lvlm_jax.train import losses
from lvlm_jax.train.step import LossFn
from lvlm_jax.vision.vq import VQ, to_pixels


def tokenizer_loss(model: VQ, **weights: Any) -> LossFn:
    """Trains a tokenizer on the pictures of a batch; its text is not read.

    weights: ``distance``, ``commitment`` and ``codebook`` of `losses.tokenizer_loss`.
    """

    def loss(params: dict, batch: Batch) -> tuple:
        pixels = to_pixels(batch.patches.reshape(-1, *batch.patches.shape[2:]), model.config)
        real = batch.patch_segments.max(-1).reshape(-1) > 0
        return losses.tokenizer_loss(pixels, model.apply({"params": params}, pixels), real, **weights)

    return loss


def started_codebook(model: VQ, params: dict, batch: Batch, key: jax.Array) -> dict:
    """The parameters with a codebook among the latents of a batch's pictures, drawn at random.

    A codebook far from the latents is little used: all of them fall to the few rows that come near first, and only rows
    that are chosen learn. (SoundStream, arXiv 2107.03312, section III.C, starts from means of the first batch.)
    """
    pixels = to_pixels(batch.patches.reshape(-1, *batch.patches.shape[2:]), model.config)
    latents = jax.jit(lambda p, x: model.apply({"params": p}, x, method="latents"))(params, pixels)
    real = batch.patch_segments.max(-1).reshape(-1) > 0
    rows = latents[real].reshape(-1, latents.shape[-1])
    place, noise = jax.random.split(key)
    chosen = jax.random.choice(place, rows, (model.config.codes,), replace=len(rows) < model.config.codes)
    # Apart by a little, so that no two rows are the same.
    apart = 0.01 * rows.std(0) * jax.random.normal(noise, chosen.shape)
    return {**params, "codebook": (chosen + apart).astype(params["codebook"].dtype)}


def token_loss(
    model: Unified,
    *,
    z_loss: float = 1e-5,
    head_trained: bool = True,
    shards: int = 1,
    chunk: int = 256,
    skip_unlabelled: bool = False,
) -> LossFn:
    """Next-token cross-entropy over text and picture tokens: one sequence, one loss.

    `Batch.weights` says what is a target, of pictures too (`processing.interleaved`). Train ``llm/**``: the tokenizer
    gets no gradient. head_trained, shards, chunk, skip_unlabelled: as `losses.language_loss` takes them.
    """

    def loss(params: dict, batch: Batch) -> tuple:
        tokens = model.apply({"params": params}, batch, method="tokens")
        read = {name: getattr(batch, name)[:, :0] for name in ("patches", "patch_positions", "patch_segments")}
        hidden, _ = model.apply({"params": params}, batch.replace(tokens=tokens, **read))
        total, weight, correct = losses.language_loss(
            hidden,
            model.apply({"params": params}, method="head_kernel"),
            tokens,
            jnp.asarray(batch.weights),
            chunk=chunk,
            skip_unlabelled=skip_unlabelled,
            head_trained=head_trained,
            shards=shards,
            softcap=model.config.llm.final_softcap,
            z_loss=z_loss,
        )
        return total, weight, {"correct": correct}

    return loss
