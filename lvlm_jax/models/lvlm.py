"""A vision-language model: vision tower, connector, decoder, and how the one enters the other."""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.connectors import ConnectorConfig
from lvlm_jax.connectors.pooled import squares
from lvlm_jax.fusion import cross_attention, soft_tokens, visual_expert
from lvlm_jax.fusion.cross_attention import CrossAttention, CrossAttentionConfig, Media, MediaCache
from lvlm_jax.fusion.words import Words
from lvlm_jax.llm.decoder import Decoder, DecoderConfig, new_cache
from lvlm_jax.mesh import constrain
from lvlm_jax.nn import ranges as R
from lvlm_jax.processing.schema import TAPS, Batch
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision import VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LVLMConfig:
    """The three parts, and how text attends: "causal", or "prefix" (all before the first target sees itself whole).

    newline: pictures are cut into tiles, and a learned token ends each row of their grid (LLaVA-NeXT).
    expert: the decoder's layers have weights of their own for the positions of pictures, and a picture begins and ends
    with a learned vector (CogVLM's visual expert, `fusion.visual_expert`).
    fusion: gated cross-attention between the decoder's layers, instead of soft tokens in the text.
    words: so many words beyond the decoder's vocabulary, in matrices of their own beside its (Idefics).
    pools_frames: the features of a video's frames are averaged over squares of four before the connector, which reads
    pictures as they are (LLaVA-NeXT-Video).
    public: the public ``model_type`` to write where several hold the same parts; None takes the first that does.
    """

    vision: VisionConfig
    connector: ConnectorConfig
    llm: DecoderConfig
    attention: Literal["causal", "prefix"] = "causal"
    newline: bool = False
    expert: bool = False
    fusion: CrossAttentionConfig | None = None
    words: int = 0
    pools_frames: bool = False
    public: str | None = None

    def __post_init__(self) -> None:
        if self.expert:
            visual_expert.check(self.llm)
            if self.newline or self.attention != "causal":
                raise ValueError(
                    f"expert=True with newline={self.newline}, attention={self.attention!r}: a visual expert sees "
                    "whole pictures, causally; set newline=False and attention='causal'"
                )
        if self.expert and self.fusion is not None:
            raise ValueError("expert=True with fusion: a visual expert works on soft tokens; choose one of the two")
        if self.newline and self.fusion is not None:
            raise ValueError(
                "newline=True with fusion: a newline ends a row of soft tokens, and cross-attention has none"
            )
        if self.words and self.fusion is None:
            raise ValueError(f"words={self.words}: where pictures are soft tokens, new words are rows of llm.vocab")
        if self.words and (self.llm.final_softcap is not None or self.llm.scale_embeddings):
            raise ValueError(
                f"words={self.words}: words beside a decoder's own are neither scaled nor capped, as its own are here "
                f"(scale_embeddings={self.llm.scale_embeddings}, final_softcap={self.llm.final_softcap}); grow "
                "llm.vocab instead"
            )
        if self.newline and math.isqrt(self.visual_tokens) ** 2 != self.visual_tokens:
            raise ValueError(
                f"newline=True with {self.visual_tokens} visual tokens of a picture, which is no square: tiles make "
                "one grid only where each is one (set class_feature=False, or choose another connector)"
            )

    @property
    def visual_tokens(self) -> int:
        """Text positions of one vision row (Q), a picture or a tile of one; 1 where text looks at them (`fusion`)."""
        return self.row_tokens if self.fusion is None else 1

    @property
    def row_tokens(self) -> int:
        """Visual tokens of one vision row, in the text or beside it."""
        return self.connector.tokens(self.vision.features) + (visual_expert.ENDS if self.expert else 0)

    @property
    def shares_pictures(self) -> bool:
        """Whether rows may share a vision row: not where an expert, or a range of pictures, needs a row's own."""
        return not self.expert and (self.fusion is None or self.fusion.scope == "last")

    @property
    def vocab(self) -> int:
        """All words: the decoder's, and those beside."""
        return self.llm.vocab + self.words

    @property
    def decoding(self) -> tuple[str, ...]:
        """The parts of the parameters that a step of decoding reads."""
        return ("llm", *(("fusion",) if self.fusion else ()), *(("words",) if self.words else ()))


class LVLM(nn.Module):
    """LLaVA 1, 1.5 and NeXT, and the same with another connector; with `expert` CogVLM, with a `fusion` Flamingo.

    Example:
      >>> import jax
      >>> from lvlm_jax import zoo
      >>> from lvlm_jax.models.lvlm import LVLM, dummy_batch
      >>> from lvlm_jax.nn.linear import abstract
      >>> config = zoo.SYSTEMS["llava15_7b"].config
      >>> shapes, axes = abstract(LVLM(config), dummy_batch(config))  # nothing is computed
      >>> shapes["connector"]["linear_1"]["kernel"].shape, axes["connector"]["linear_1"]["kernel"]
      ((1024, 4096), ('embed', 'mlp'))

    Parameters: ``vision``, ``connector``, ``llm``; ``newline``, ``ends``, ``fusion``, ``words`` where there are some.
    """

    config: LVLMConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The parts."""
        c = self.config
        self.vision = c.vision.build(self.dtype, self.scan, self.remat)
        self.connector = c.connector.build(c.llm.width, self.dtype, self.scan, self.remat)
        block = visual_expert.block(c.llm, self.dtype) if c.expert else None
        self.llm = Decoder(c.llm, self.dtype, self.scan, self.remat, block)
        if c.newline:
            self.newline = soft_tokens.Newline(c.llm.width, self.dtype)
        if c.expert:
            self.ends = visual_expert.Ends(self.dtype)
        if c.fusion is not None:
            self.fusion = CrossAttention(c.fusion, c.llm.width, c.llm.depth, self.dtype, self.scan, self.remat)
        if c.words:
            self.words = Words(c.words, c.llm.width, c.llm.tied, self.dtype)

    def __call__(self, batch: Batch, cache: Any = None) -> tuple[Float[Array, "B T D"], Any]:
        """A whole batch -> (hidden states after the final norm, cache filled from position 0 where one is given)."""
        index = None if cache is None else jnp.zeros((), jnp.int32)
        if self.config.fusion is not None:
            return self._fused(batch, cache, index)
        x = self.embed(batch)
        if not self.config.expert:
            return self.llm(x, batch.positions, self.ranges(batch), cache, index)
        q, (groups, pictures) = self.config.visual_tokens, batch.patches.shape[:2]
        behind = visual_expert.skipped(batch.positions, batch.image_index, q)
        routing = visual_expert.routing(batch.image_index, groups, pictures, q)
        text = None if cache is None else cache.text
        hidden, text = self.llm(x, batch.positions - behind, self.ranges(batch), text, index, routing)
        # Rows are padded on the left, so that the last position is the newest of each.
        return hidden, None if cache is None else visual_expert.Cache(text, behind[:, -1])

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        start: Int[Array, "B"],
        cache: Any,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The next tokens of rows whose earlier keys are cached -> (hidden states, cache).

        Args:
          positions: rotary position of each token.
          start: the first real cache slot of each row (rows are padded on the left).
          index: the cache slot of the first of these tokens, the same for all rows.
        """
        ranges, x = R.cached(start, index + tokens.shape[1], tokens.shape[1]), self.embed_tokens(tokens)
        if self.config.fusion is not None:
            among = self.fusion.among(cache.media(tokens.shape[1]), cache.kept)
            hidden, text = self.llm(x, positions, ranges, cache.text, index, between=among)
            return hidden, dataclasses.replace(cache, text=text)
        if not self.config.expert:
            return self.llm(x, positions, ranges, cache, index)
        hidden, text = self.llm(x, positions - cache.skipped[:, None], ranges, cache.text, index)
        return hidden, dataclasses.replace(cache, text=text)

    def _fused(self, batch: Batch, cache: Any, index: Any) -> tuple[Float[Array, "B T D"], Any]:
        """`__call__` with gated cross-attention."""
        x, ranges, media = self.embed_tokens(batch.tokens), self.ranges(batch), self.media(batch)
        if self.is_initializing():
            self.fusion(x, media)
            return self.llm(x, batch.positions, ranges)
        among = self.fusion.among(media)
        text = None if cache is None else cache.text
        hidden, text = self.llm(x, batch.positions, ranges, text, index, between=among)
        if cache is None:
            return hidden, None
        # Rows are padded on the left, so that the last position is the newest of each.
        start, stop = (ends.reshape(batch.tokens.shape)[:, -1] for ends in (media.ranges.start, media.ranges.stop))
        return hidden, MediaCache(text, among.made, start, stop)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of words, the decoder's own and those beside."""
        x = self.llm.embed_tokens(tokens)
        return self.words.embed(x, tokens - self.config.llm.vocab) if self.config.words else x

    def media(self, batch: Batch) -> Media:
        """The pictures, and which of their visual tokens each position sees."""
        c, groups = self.config, batch.patches.shape[0]
        seen = R.media(batch.segments, batch.image_index, c.row_tokens, c.fusion.scope)
        tokens = None
        if batch.patches.shape[1] or self.is_initializing():
            tokens = self.embed_images(batch.patches, batch.patch_positions, batch.patch_segments)
        return Media(cross_attention.grouped(seen, groups), tokens)

    def embed(self, batch: Batch) -> Float[Array, "B T D"]:
        """Token embeddings with the pictures filled in, where they stand in the text."""
        text = self.embed_tokens(batch.tokens)
        if self.config.fusion is not None:
            return text
        if batch.patches.shape[1] == 0 and not self.is_initializing():
            return text
        visual = self.embed_images(batch.patches, batch.patch_positions, batch.patch_segments, batch.frames)
        if self.config.newline:
            visual = soft_tokens.append(visual, self.newline())
        return soft_tokens.fill(text, visual, batch.image_index, batch.blend_index, batch.blend_weight)

    def embed_images(
        self,
        patches: Float[Array, "G N P C"],
        positions: Int[Array, "G N P 2"],
        segments: Int[Array, "G N P"],
        frames: Int[Array, "G N"] | None = None,
    ) -> Float[Array, "G M D"]:
        """Pictures -> the M = N*Q visual tokens of each group, in the language model's width."""
        groups, rows = patches.shape[:2]
        flat = lambda x: constrain(x.reshape(groups * rows, *x.shape[2:]), ("batch",) + (None,) * (x.ndim - 2))  # noqa: E731
        features = self.vision.features(flat(patches), flat(positions), flat(segments))
        if self.config.pools_frames and frames is not None:
            features = jnp.where(frames.reshape(-1, 1, 1) > 0, squares(features), features)
        tokens = self.connector(features)
        if self.config.expert:
            tokens = self.ends(tokens)
        return tokens.reshape(groups, rows * tokens.shape[1], tokens.shape[2])

    def ranges(self, batch: Batch) -> R.Ranges:
        """The keys each position sees."""
        if self.config.attention == "causal":
            return R.packed_causal(batch.segments)
        return R.packed_prefix(batch.segments, soft_tokens.prefix_of(batch.segments, batch.weights))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        logits = self.llm.logits(hidden)
        return jnp.concatenate([logits, self.words.logits(hidden)], axis=-1) if self.config.words else logits

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output head's kernel, for a loss that computes logits only where a label is."""
        kernel = self.llm.head_kernel()
        return jnp.concatenate([kernel, self.words.head_kernel()], axis=1) if self.config.words else kernel

    def new_cache(self, rows: int, length: int, groups: int = 1, pictures: int = 0) -> Any:
        """An empty cache for `rows` rows of at most `length` positions. Needs no parameters.

        Args:
          groups, pictures: of the batch that will fill it, and vision rows of each group; for shapes alone, since a
            filled cache holds what the batch brought.
        """
        text = new_cache(self.config.llm, rows, length, self.dtype, self.scan)
        if self.config.expert:
            return visual_expert.Cache(text, jnp.zeros(rows, jnp.int32))
        if self.config.fusion is None:
            return text
        keys = pictures * self.config.row_tokens
        return cross_attention.new_cache(
            self.config.fusion, self.config.llm.depth, text, rows, groups, keys, self.dtype
        )


def dummy_batch(config: Any, rows: int = 1, length: int = 8, pictures: int = 1, blend: bool = False) -> Batch:
    """A smallest batch of the right shapes, for `init` and for shapes alone (zeros; nothing to learn from).

    config: of any model whose `vision` says how many patches of how many values a picture has.
    blend: with positions that several visual tokens fill.
    """
    text = jnp.zeros((rows, length), jnp.int32)
    n, p, c = pictures, config.vision.patches, config.vision.values
    return Batch(
        tokens=text,
        weights=jnp.zeros((rows, length), jnp.float32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
        segments=text + 1,
        image_index=text - 1,
        patches=jnp.zeros((1, n, p, c), jnp.float32),
        patch_positions=jnp.zeros((1, n, p, 2), jnp.int32),
        patch_segments=jnp.ones((1, n, p), jnp.int32),
        frames=jnp.zeros((1, n), jnp.int32) if getattr(config, "pools_frames", False) else None,
        blend_index=jnp.zeros((rows, length, TAPS), jnp.int32) if blend else None,
        blend_weight=jnp.zeros((rows, length, TAPS), jnp.float32) if blend else None,
    )
