"""One transformer that reads and writes text and pictures: a picture is a run of tokens like any other (Chameleon).

A frozen tokenizer (`vision.vq`) makes codes of pictures, and each code is a word of the vocabulary. So there is one
sequence and one loss: next-token cross-entropy over text and picture tokens, `losses.language_loss` of
`Unified.tokens`. Source: Chameleon (arXiv 2405.09818), whose remedies against drifting norms are values here: norms of
queries and keys (`DecoderConfig.qk_norm`), the order of norms (`DecoderConfig.order`) and the z-loss (of the loss).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.fusion import discrete_tokens
from lvlm_jax.llm.decoder import Decoder, DecoderConfig, new_cache
from lvlm_jax.mesh import constrain
from lvlm_jax.nn import ranges as R
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision.vq import VQ, VQConfig, to_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnifiedConfig:
    """Tokenizer, decoder, and the words of the vocabulary that are no text.

    code_ids: token id of each code. begin_id, end_id: what stands before and behind a picture's tokens. image_id: the
    placeholder of a picture's tokens in a prompt. text_only: picture tokens are never predicted (their logits are the
    least number there is), as in the torch library's class.
    """

    vision: VQConfig
    llm: DecoderConfig
    code_ids: tuple[int, ...]
    begin_id: int
    end_id: int
    image_id: int
    text_only: bool = False

    def __post_init__(self) -> None:
        if len(self.code_ids) != self.vision.codes:
            raise ValueError(f"code_ids has {len(self.code_ids)} ids, but the tokenizer has codes={self.vision.codes}")
        special = (self.begin_id, self.end_id, self.image_id)
        if len({*self.code_ids, *special}) != len(self.code_ids) + len(special):
            raise ValueError(
                f"code_ids, begin_id={self.begin_id}, end_id={self.end_id} and image_id={self.image_id} share an id; "
                "each must have one of its own"
            )
        if wrong := [i for i in (*self.code_ids, *special) if not 0 <= i < self.llm.vocab]:
            raise ValueError(f"token id {wrong[0]} of a picture is outside the vocabulary of {self.llm.vocab}")

    @property
    def vocab(self) -> int:
        """All words, codes of pictures among them."""
        return self.llm.vocab

    @property
    def decoding(self) -> tuple[str, ...]:
        """The parts of the parameters that a decoding step reads."""
        return ("llm",)

    @property
    def shares_pictures(self) -> bool:
        """Whether rows about one picture may share it: what stands for it depends on no row."""
        return True

    @property
    def fusion(self) -> None:
        """No layers between the decoder's: pictures are tokens among the others."""
        return None

    @property
    def visual_tokens(self) -> int:
        """Tokens of a picture, less those that begin and end it."""
        return self.vision.patches


class Unified(nn.Module):
    """A unified token model.

    Example:
      >>> from lvlm_jax.models.lvlm import dummy_batch
      >>> from lvlm_jax.models.unified import Unified
      >>> from lvlm_jax.nn.linear import abstract
      >>> from lvlm_jax.zoo import chameleon
      >>> config = chameleon.PRESETS["chameleon_7b"]
      >>> shapes, axes = abstract(Unified(config, scan=True), dummy_batch(config))  # nothing is computed
      >>> shapes["vision"]["codebook"].shape, shapes["llm"]["layers"]["attn"]["q_norm"]["scale"].shape
      ((8192, 256), (32, 32, 128))

    Pictures come as `Batch.patches`, one a code, and are tokenized here; or as tokens of the row, tokenized before by
    `read`, which costs nothing in the step. Parameters: ``vision`` (the tokenizer, which gets no gradient) and ``llm``.
    """

    config: UnifiedConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """The parts."""
        # In float32 whatever the rest is: rounded latents have other neighbours.
        self.vision = VQ(self.config.vision, jnp.float32)
        self.llm = Decoder(self.config.llm, self.dtype, self.scan, self.remat)

    def __call__(self, batch: Batch, cache: Any = None) -> tuple[Float[Array, "B T D"], Any]:
        """A whole batch -> (hidden states after the final norm, cache filled from position 0 where one is given)."""
        x = self.llm.embed_tokens(self.tokens(batch))
        index = None if cache is None else jnp.zeros((), jnp.int32)
        return self.llm(x, batch.positions, R.packed_causal(batch.segments), cache, index)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        start: Int[Array, "B"],
        cache: Any,
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The next tokens of rows whose earlier keys are cached; see `LVLM.decode`."""
        ranges = R.cached(start, index + tokens.shape[1], tokens.shape[1])
        return self.llm(self.llm.embed_tokens(tokens), positions, ranges, cache, index)

    def tokens(self, batch: Batch) -> Int[Array, "B T"]:
        """The rows with the pictures' tokens filled in: what is read, and what is to be predicted."""
        tokens = jnp.asarray(batch.tokens)
        if self.is_initializing():
            self.vision(to_pixels(batch.patches.reshape(-1, *batch.patches.shape[2:]), self.config.vision))
        if batch.patches.shape[1] == 0:
            return tokens
        return discrete_tokens.fill(tokens, self.read(batch.patches), batch.image_index)

    def read(self, patches: Float[Array, "G N P C"]) -> Int[Array, "G M"]:
        """Pictures -> the M = N*P token ids of each group."""
        groups, rows = patches.shape[:2]
        flat = constrain(patches.reshape(groups * rows, *patches.shape[2:]), ("batch", None, None))
        codes = self.vision.encode(to_pixels(flat, self.config.vision))
        return jax.lax.stop_gradient(jnp.asarray(self.config.code_ids, jnp.int32)[codes]).reshape(groups, -1)

    def write(self, tokens: Int[Array, "N P"]) -> Float[Array, "N tall wide 3"]:
        """The token ids of whole pictures -> their pixels, about -1 to 1."""
        codes = np.zeros(self.config.llm.vocab, np.int32)
        codes[list(self.config.code_ids)] = np.arange(self.config.vision.codes)
        return self.vision.decode(jnp.asarray(codes)[tokens])

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        scores = self.llm.logits(hidden)
        if not self.config.text_only:
            return scores
        hidden_from = np.zeros(self.config.llm.vocab, bool)
        hidden_from[list(self.config.code_ids)] = True
        return jnp.where(jnp.asarray(hidden_from), jnp.finfo(scores.dtype).min, scores)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The output head's kernel, for a loss that computes logits only where a label is."""
        return self.llm.head_kernel()

    def new_cache(self, rows: int, length: int) -> Any:
        """An empty cache for `rows` rows of at most `length` positions. Needs no parameters."""
        return new_cache(self.config.llm, rows, length, self.dtype, self.scan)
