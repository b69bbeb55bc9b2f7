"""Pictures and texts scored against one another by a Q-Former: BLIP-2's first stage, and the retrieval models of it.

Source: BLIP-2 (arXiv 2301.12597), section 3.2. Its losses are `train.qformer_losses`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.connectors import QFormer, QFormerConfig
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.mlp import ACTIVATIONS
from lvlm_jax.nn.norms import LayerNorm, unit
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision.vit import VisionTower, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextConfig:
    """A vision tower, a Q-Former with a vocabulary, and the width in which both sides meet.

    pretrains: with the temperature and the word head, which pre-training needs and released retrieval models lack.
    """

    vision: ViTConfig
    qformer: QFormerConfig
    projection: int = 256
    pretrains: bool = True

    def __post_init__(self) -> None:
        if self.qformer.vocab is None:
            raise ValueError("qformer.vocab=None: a Q-Former that is scored against texts reads them; give it a vocab")


class WordHead(nn.Module):
    """BERT's head: a dense layer, its norm, then the word table and a bias for each word."""

    vocab: int
    activation: str
    norm_eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T D"], table: Float[Array, "D V"]
    ) -> tuple[Float[Array, "N T F"], Float[Array, "F V"]]:
        """(hidden states, kernel) whose product are the logits: the bias is a last row, under a value of one."""
        bias = self.param("bias", named(nn.initializers.zeros, ("vocab",)), (self.vocab,))
        x = linear(x.shape[-1], ("embed", None), use_bias=True, dtype=self.dtype, name="dense")(x)
        x = LayerNorm(self.norm_eps, self.dtype, name="norm")(ACTIVATIONS[self.activation](x))
        return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1), jnp.concatenate([table, bias[None]])


class ImageText(nn.Module):
    """Vision tower and Q-Former with projections to a joint space, a head for matching and one for words.

    Texts are BERT's ids, padded on the right; `segments` are 0 there. Parameters: ``vision``, ``qformer``,
    ``vision_projection``, ``text_projection``, ``match_head``; where it pre-trains ``word_head`` and ``temperature``.
    """

    config: ImageTextConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """Tower, Q-Former, projections, heads."""
        c = self.config
        self.vision = VisionTower(c.vision, self.dtype, self.scan, self.remat)
        self.qformer = QFormer(c.qformer, self.dtype, self.scan, self.remat)
        self.vision_projection = linear(c.projection, ("embed", None), use_bias=True, dtype=self.dtype)
        self.text_projection = linear(c.projection, ("embed", None), use_bias=True, dtype=self.dtype)
        self.match_head = linear(2, ("embed", None), use_bias=True, dtype=self.dtype)
        if c.pretrains:
            self.word_head = WordHead(c.qformer.vocab, c.qformer.activation, c.qformer.norm_eps, self.dtype)
            self.temperature = self.param("temperature", named(nn.initializers.constant(0.07), ()), ())

    def __call__(self, batch: Batch) -> tuple[Float[Array, "N Q E"], Float[Array, "B E"]]:
        """(vectors of each picture's queries, vector of each text), all of unit length.

        Picture i belongs to text row i: one example a row, one picture an example.
        """
        features = self.features(batch)
        if self.is_initializing():  # heads and projections that other methods read
            self.match(features, batch.tokens, batch.segments)
            if self.config.pretrains:
                self.caption(features, batch.tokens, batch.segments)
        return self.embed_images(features), self.embed_text(batch.tokens, batch.segments)

    def features(self, batch: Batch) -> Float[Array, "N P D"]:
        """What the Q-Former reads of each picture; the tower's last norm is BLIP-2's, which trains though it does not.

        Everything else takes these, so that a picture is read once whatever it is scored against.
        """
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        return self.vision.features(flat(batch.patches), flat(batch.patch_positions), flat(batch.patch_segments))

    def embed_images(self, features: Float[Array, "N P D"]) -> Float[Array, "N Q E"]:
        """Unit vector of each query of each picture."""
        return unit(self.vision_projection(self.qformer(features)))

    def embed_text(self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Unit vector of each text: of its first token, which BERT's tokenizer puts there."""
        return unit(self.text_projection(self.qformer(None, tokens, segments)[:, 0]))

    def match(
        self, features: Float[Array, "N P D"], tokens: Int[Array, "N T"], segments: Int[Array, "N T"]
    ) -> Float[Array, "N 2"]:
        """Scores (no match, match) of each picture with the text of the same row: the mean over its queries."""
        states = self.qformer(features, tokens, segments)[:, : self.config.qformer.queries]
        return self.match_head(states).astype(jnp.float32).mean(1)

    def caption(
        self, features: Float[Array, "N P D"], tokens: Int[Array, "N T"], segments: Int[Array, "N T"]
    ) -> tuple[Float[Array, "N Q E"], Float[Array, "N T F"], Float[Array, "F V"]]:
        """(what `embed_images` gives, hidden states of the text, kernel of its words): the product are the logits.

        One pass for two losses: queries that see no text are the same beside one.
        """
        count = self.config.qformer.queries
        states = self.qformer(features, tokens, segments, "causal")
        return (
            unit(self.vision_projection(states[:, :count])),
            *self.word_head(states[:, count:], self.qformer.head_kernel()),
        )
