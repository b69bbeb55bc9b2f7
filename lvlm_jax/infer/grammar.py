"""Which tokens may come where in an answer of text and pictures: pure functions that run inside a decoding step.

After the token that begins a picture come exactly as many picture tokens as a picture has, then the token that ends
it; elsewhere only text. So what is written can always be split and drawn.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lvlm_jax.models.unified import UnifiedConfig
from lvlm_jax.shapes import Array, Bool, Int, pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Writing:
    """Where each row is: tokens still due of its picture, the one that ends it included (0: in text).

    left: how many tokens the answer may still have.
    """

    due: Int[Array, "B"]
    left: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureGrammar:
    """The words that are no text, and how many tokens a picture has.

    pictures: whether an answer may begin one; one that the prompt has begun is always ended.
    """

    code_ids: tuple[int, ...]
    begin_id: int
    end_id: int
    image_id: int
    count: int
    pictures: bool = True

    def start(
        self, tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"], segments: Array | np.ndarray, left: Int[Array, ""]
    ) -> Writing:
        """Behind prompts that end at the last position: in text, or in the picture that a prompt has begun."""
        begun = (jnp.asarray(tokens) == self.begin_id) & (jnp.asarray(segments) > 0)
        since = jnp.argmax(begun[:, ::-1], axis=1)  # tokens behind the last one that begins a picture
        due = jnp.where(begun.any(axis=1), self.count + 1 - since, 0)
        return Writing(jnp.maximum(due, 0).astype(jnp.int32), left)

    def allowed(self, writing: Writing, vocab: int) -> Bool[Array, "B V"]:
        """The tokens that may come next in each row: never none."""
        code = np.zeros(vocab, bool)
        code[list(self.code_ids)] = True
        one = lambda token: np.arange(vocab) == token  # noqa: E731
        begin, end = one(self.begin_id), one(self.end_id)
        text = ~(code | begin | end | one(self.image_id))
        fits = writing.left >= self.count + 2 if self.pictures else jnp.zeros((), bool)
        due = writing.due[:, None]
        return jnp.where(due > 1, code, jnp.where(due == 1, end, text | (begin & fits)))

    def after(self, writing: Writing, tokens: Int[Array, "B"]) -> Writing:
        """Where each row is once these tokens are written."""
        text = jnp.where(tokens == self.begin_id, self.count + 1, 0)
        return Writing(jnp.where(writing.due > 0, writing.due - 1, text).astype(jnp.int32), writing.left - 1)


def grammar_of(config: UnifiedConfig, pictures: bool = True) -> PictureGrammar:
    """The grammar of a model's answers.

    Raises:
      ValueError: a model that never predicts picture tokens is to write pictures.
    """
    if pictures and config.text_only:
        raise ValueError(
            "this model never predicts picture tokens (text_only=True, as the torch library's class has it); to write "
            "pictures give it dataclasses.replace(config, text_only=False), with a tokenizer that has a decoder"
        )
    return PictureGrammar(
        code_ids=config.code_ids,
        begin_id=config.begin_id,
        end_id=config.end_id,
        image_id=config.image_id,
        count=config.visual_tokens,
        pictures=pictures,
    )
