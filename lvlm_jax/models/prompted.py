"""Models around a P-Former: itself before a frozen language model, and beside a Q-Former that learns from it.

Source: BLIText (arXiv 2307.07063), section 3, and its repository. Its losses are `train.pformer_losses`.
"""

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.connectors.pformer import PFormer, PFormerConfig
from lvlm_jax.llm.decoder import Decoder, DecoderConfig
from lvlm_jax.models.image_text import ImageText
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import linear
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


class PromptedDecoder(nn.Module):
    """A P-Former, and the language model that writes a sentence from its prompt: stage 0.

    A row holds the sentence twice: the first `reads` positions in BERT's words, padded with `pad_id`, the others in the
    language model's. Parameters: ``pformer`` and ``llm``.
    """

    former: PFormerConfig
    config: DecoderConfig
    reads: int = 32
    pad_id: int = 0
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """Both parts."""
        self.pformer = PFormer(self.former, self.config.width, self.dtype, self.scan, self.remat)
        self.llm = Decoder(self.config, self.dtype, self.scan, self.remat)

    def __call__(self, batch: Batch) -> Float[Array, "B S D"]:
        """Hidden states of the language model behind the prompt of each row, which they include."""
        tokens, shown = batch.tokens[:, : self.reads], self.shown(batch)
        return self.write(self.read(tokens, shown)[0], batch.tokens[:, self.reads :], batch.segments[:, self.reads :])

    def shown(self, batch: Batch) -> Int[Array, "B T"]:
        """1 where BERT's half of a row holds a word; 0 everywhere in rows that only fill up the batch."""
        real = batch.segments.max(1, keepdims=True) > 0
        return ((batch.tokens[:, : self.reads] != self.pad_id) & real).astype(jnp.int32)

    def read(
        self, tokens: Int[Array, "B T"], shown: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B E"]]:
        """What `PFormer` makes of BERT's words."""
        return self.pformer(tokens, shown)

    def write(
        self, prompt: Float[Array, "B Q D"], tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B S D"]:
        """Hidden states over the prompt and then the sentence, S = Q + T."""
        x = jnp.concatenate([prompt, self.llm.embed_tokens(tokens)], axis=1)
        front = jnp.broadcast_to(segments.max(1, keepdims=True), (len(tokens), prompt.shape[1]))
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return self.llm(x, positions, R.packed_causal(jnp.concatenate([front, segments], axis=1)))[0]

    def head_kernel(self) -> Float[Array, "D V"]:
        """The language model's output head."""
        return self.llm.head_kernel()


class AlignedImageText(ImageText):
    """BLIP-2's first stage beside a frozen P-Former, whose prompt the projected queries are drawn to.

    Parameters: `ImageText`'s, ``language_projection`` (queries to the width of the language model) and ``pformer``.
    """

    former: PFormerConfig = PFormerConfig()
    width: int = 2560

    def setup(self) -> None:
        """What `ImageText` has, and the two parts beside."""
        super().setup()
        self.language_projection = linear(self.width, ("embed", "mlp"), use_bias=True, dtype=self.dtype)
        self.pformer = PFormer(self.former, self.width, self.dtype, self.scan, self.remat)

    def __call__(self, batch: Batch) -> tuple[Float[Array, "N Q E"], Float[Array, "B E"]]:
        """As `ImageText`'s."""
        if self.is_initializing():
            self.align(self.features(batch), batch.tokens, batch.segments)
        return super().__call__(batch)

    def align(
        self,
        features: Float[Array, "N P D"],
        tokens: Int[Array, "N T"],
        segments: Int[Array, "N T"],
    ) -> tuple[Float[Array, "N Q F"], Float[Array, "N Q F"]]:
        """(projected queries of each picture, prompt of its text): what `pformer_losses.alignment_loss` compares."""
        return self.language_projection(self.qformer(features)), self.pformer(tokens, segments)[0]
