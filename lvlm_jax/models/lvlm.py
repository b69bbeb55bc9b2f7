"""A vision-language model: vision tower, connector, decoder, and how the one enters the other."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.fusion import cross_attention, soft_tokens, two_stacks, visual_expert
from lvlm_jax.fusion.cross_attention import CrossAttention, Media, MediaCache
from lvlm_jax.fusion.deepstack import Deepstack
from lvlm_jax.fusion.words import Words
from lvlm_jax.llm.decoder import Decoder, new_cache
from lvlm_jax.llm.encoder_decoder import EncoderDecoder
from lvlm_jax.mesh import constrain
from lvlm_jax.models.config import LVLMConfig
from lvlm_jax.models.senses import Senses, dummy_rows
from lvlm_jax.nn import ranges as R
from lvlm_jax.processing.schema import TAPS, Batch
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision import NativeViTConfig

__all__ = ["LVLM", "LVLMConfig", "dummy_batch"]


class LVLM(nn.Module):
    """LLaVA 1, 1.5 and NeXT, and the same with another connector; with `expert` CogVLM, with a `fusion` Flamingo.

    With a tower for pictures of any size and a decoder that counts along three axes it is Qwen2-VL and its kin.
    With a Q-Former and OPT or Flan-T5 it is BLIP-2, and where that Q-Former has a vocabulary InstructBLIP.

    Example:
      >>> import jax
      >>> from lvlm_jax import zoo
      >>> from lvlm_jax.models.lvlm import LVLM, dummy_batch
      >>> from lvlm_jax.nn.linear import abstract
      >>> config = zoo.SYSTEMS["llava15_7b"].config
      >>> shapes, axes = abstract(LVLM(config), dummy_batch(config))  # nothing is computed
      >>> shapes["connector"]["linear_1"]["kernel"].shape, axes["connector"]["linear_1"]["kernel"]
      ((1024, 4096), ('embed', 'mlp'))

    Parameters: ``vision``, ``connector``, ``llm``; ``newline``, ``ends``, ``fusion``, ``words``, ``senses/NAME`` where
    there are some.
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
        options = (self.dtype, self.scan, self.remat)
        block = (visual_expert.block(c.llm, self.dtype),) if c.expert else ()
        self.llm = EncoderDecoder(c.llm, *options) if c.two_stacks else Decoder(c.llm, *options, *block)
        if c.newline:
            self.newline = soft_tokens.Newline(c.llm.width, self.dtype)
        if c.expert:
            self.ends = visual_expert.Ends(self.dtype)
        if c.fusion is not None:
            self.fusion = CrossAttention(c.fusion, c.llm.width, c.llm.depth, self.dtype, self.scan, self.remat)
        if c.words:
            self.words = Words(c.words, c.llm.width, c.llm.tied, self.dtype)
        if c.senses:
            self.senses = Senses(c.senses, c.llm.width, self.dtype, self.scan, self.remat)

    def __call__(self, batch: Batch, cache: Any = None) -> tuple[Float[Array, "B T D"], Any]:
        """A whole batch -> (hidden states after the final norm, cache filled from position 0 where one is given)."""
        index = None if cache is None else jnp.zeros((), jnp.int32)
        if self.config.fusion is not None:
            return self._fused(batch, cache, index)
        x, added = self._embed(batch)
        if self.config.two_stacks:
            return two_stacks.run(self.llm, x, batch, cache)
        if self.config.mrope is not None:
            return self._counted(batch, x, added, cache, index)
        if not self.config.expert:
            return self.llm(x, batch.positions, self.ranges(batch), cache, index, between=self._between(added))
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
        if self.config.two_stacks:
            return two_stacks.go_on(self.llm, tokens, start, cache, index)
        ranges, x = R.cached(start, index + tokens.shape[1], tokens.shape[1]), self.embed_tokens(tokens)
        if self.config.fusion is not None:
            among = self.fusion.among(cache.media(tokens.shape[1]), cache.kept)
            hidden, text = self.llm(x, positions, ranges, cache.text, index, between=among)
            return hidden, dataclasses.replace(cache, text=text)
        if isinstance(cache, visual_expert.Cache):
            positions = positions - cache.skipped[:, None]
            if self.config.mrope is not None:
                positions = jnp.repeat(positions[..., None], self.config.llm.counts, axis=-1)
            hidden, text = self.llm(x, positions, ranges, cache.text, index)
            return hidden, dataclasses.replace(cache, text=text)
        return self.llm(x, positions, ranges, cache, index)

    def _counted(
        self, batch: Batch, x: Float[Array, "B T D"], added: tuple[Array, ...], cache: Any, index: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """`__call__` of a decoder that counts positions along three axes."""
        axes = batch.axes
        if axes is None:  # text alone
            axes = jnp.repeat(batch.positions[..., None], self.config.llm.counts, axis=-1)
        text = None if cache is None else cache.text
        hidden, text = self.llm(x, axes, self.ranges(batch), text, index, between=self._between(added))
        if cache is None:
            return hidden, None
        # Rows hold one prompt, padded on the left; its answer goes on from the largest position along any axis.
        return hidden, visual_expert.Cache(text, batch.positions[:, -1] - axes.max((1, 2)))

    def _fused(self, batch: Batch, cache: Any, index: Any) -> tuple[Float[Array, "B T D"], Any]:
        """`__call__` with gated cross-attention."""
        x, ranges, media = self.embed(batch), self.ranges(batch), self.media(batch)
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
            tokens = self._visual(batch)
        return Media(cross_attention.grouped(seen, groups), tokens)

    def embed(self, batch: Batch) -> Float[Array, "B T D"]:
        """Token embeddings with the pictures filled in, where they stand in the text."""
        return self._embed(batch)[0]

    def _embed(self, batch: Batch) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...]]:
        """(`embed`, what is added behind the first layers: zeros where a position is text)."""
        text, start = self.embed_tokens(batch.tokens), self.config.compat_bos_bug
        if start is not None:
            text = jnp.where((batch.tokens == start)[..., None], jnp.asarray(start, text.dtype), text)
        if batch.senses:
            text = self._sensed(text, batch)
        if self.config.fusion is not None:
            return text, ()
        if batch.patches.shape[1] == 0 and not self.is_initializing():
            return text, ()
        visual, *taps = jnp.split(self._visual(batch), 1 + self.config.deepstack, axis=-1)
        if self.config.newline:
            visual = soft_tokens.append(visual, self.newline())
        index, weight = batch.blend_index, batch.blend_weight
        added = tuple(soft_tokens.fill(jnp.zeros_like(text), tap, batch.image_index, index, weight) for tap in taps)
        return soft_tokens.fill(text, visual, batch.image_index, index, weight), added

    def _between(self, added: tuple[Array, ...]) -> Deepstack | None:
        """What the decoder runs between its layers; a scanned stack is not there before it is made."""
        return Deepstack(added) if added and not self.is_initializing() else None

    def _visual(self, batch: Batch) -> Float[Array, "G M D"]:
        return self.embed_images(batch.patches, batch.patch_positions, batch.patch_segments, batch.instruction)

    def _sensed(self, text: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B T D"]:
        """The embeddings with what the named senses give in its places."""
        if not self.config.senses:
            names = sorted(batch.senses)
            raise ValueError(f"batch.senses names {names}; this model has no named senses (config.senses)")
        for name, tokens in self.senses(batch.senses).items():
            text = soft_tokens.fill(text, tokens, batch.senses[name].index)
        return text

    def embed_images(
        self,
        patches: Float[Array, "G N P C"],
        positions: Int[Array, "G N P 2"],
        segments: Int[Array, "G N P"],
        instruction: Int[Array, "G N S"] | None = None,
    ) -> Float[Array, "G M D"]:
        """Pictures -> the M = N*Q visual tokens of each group, in the language model's width.

        Where the tower has tapped layers, those of each stand behind along the last axis. instruction: what an
        `instructed` model's connector reads beside each, -1 where that is padding.
        """
        groups, rows = patches.shape[:2]
        flat = lambda x: constrain(x.reshape(groups * rows, *x.shape[2:]), ("batch",) + (None,) * (x.ndim - 2))  # noqa: E731
        features = self.vision.features(flat(patches), flat(positions), flat(segments))
        if instruction is None:
            tokens = self.connector(features)
        else:
            said = flat(instruction)[:: self.config.vision.frames]  # a clip is asked once
            tokens = self.connector(features, jnp.maximum(said, 0), (said >= 0).astype(jnp.int32))
        if self.config.expert:
            tokens = self.ends(tokens)
        return tokens.reshape(groups, -1, tokens.shape[2])

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
        new = two_stacks.new_cache if self.config.two_stacks else new_cache
        text = new(self.config.llm, rows, length, self.dtype, self.scan)
        if self.config.expert or self.config.mrope is not None:
            return visual_expert.Cache(text, jnp.zeros(rows, jnp.int32))
        if self.config.fusion is None:
            return text
        keys = pictures * self.config.row_tokens
        return cross_attention.new_cache(
            self.config.fusion, self.config.llm.depth, text, rows, groups, keys, self.dtype
        )


def dummy_batch(
    config: Any, rows: int = 1, length: int = 8, pictures: int = 1, blend: bool = False, instruction: int = 4
) -> Batch:
    """A smallest batch of the right shapes, for `init` and for shapes alone (zeros; nothing to learn from).

    config: of any model whose `vision` says how many patches of how many values a picture has.
    blend: with positions that several visual tokens fill. instruction: positions of what the connector reads beside a
    picture, where it reads anything. Axes are there where `data.collate` gives some: pictures of their own resolution.
    """
    text = jnp.zeros((rows, length), jnp.int32)
    n, p, c = pictures * getattr(config.vision, "frames", 1), config.vision.patches, config.vision.values
    native = isinstance(config.vision, NativeViTConfig)
    return Batch(
        tokens=text,
        weights=jnp.zeros((rows, length), jnp.float32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
        segments=text + 1,
        image_index=text - 1,
        patches=jnp.zeros((1, n, p, c), jnp.float32),
        patch_positions=jnp.zeros((1, n, p, 2), jnp.int32),
        patch_segments=jnp.ones((1, n, p), jnp.int32),
        blend_index=jnp.zeros((rows, length, TAPS), jnp.int32) if blend else None,
        blend_weight=jnp.zeros((rows, length, TAPS), jnp.float32) if blend else None,
        axes=jnp.zeros((rows, length, 3), jnp.int32) if native and pictures else None,
        instruction=jnp.zeros((1, n, instruction), jnp.int32) if getattr(config, "instructed", False) else None,
        senses={name: dummy_rows(sense, rows, length) for name, sense in getattr(config, "senses", ())} or None,
    )
