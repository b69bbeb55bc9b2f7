"""Asking a model that reads and writes text and pictures, in one answer."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lvlm_jax.infer.generate import Generator
from lvlm_jax.infer.grammar import grammar_of
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.interleaved import interleave
from lvlm_jax.processing.schema import Encoded, Image, Text
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.shapes import Array, Float, Params

Written = list[str | np.ndarray]
"""Texts, and pictures as uint8[height, width, 3], in the order in which they were written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterleavedSystem:
    """A unified token model that can be asked.

    Attributes:
      spec: how pictures become patches, each one token.
      rows: the most prompts of one batch.
      mesh: devices to run on.
      name: what it was loaded from.
    """

    model: Unified
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    spec: ImageSpec
    rows: int = 16
    mesh: Mesh | None = None
    name: str = ""

    def __post_init__(self) -> None:
        vision = self.config.vision
        if (self.spec.patches, self.spec.values) != (vision.patches, vision.values):
            raise ValueError(
                f"pictures come in {self.spec.patches} patches of {self.spec.values} values (size {self.spec.size}, "
                f"patch {self.spec.patch}), but the tokenizer of pictures reads {vision.patches} of {vision.values}"
            )

    @property
    def config(self) -> UnifiedConfig:
        """Sizes of the model."""
        return self.model.config

    @functools.cached_property
    def generator(self) -> Generator:
        """The engine; made at the first use. It writes pictures where the model can."""
        writes = self.config.vision.decoder and not self.config.text_only
        eos = self.tokenizer.eos_id
        return Generator(
            self.model,
            self.params,
            spec=self.spec,
            pad_id=self.tokenizer.pad_id,
            eos_ids=() if eos is None else (eos,),
            rows=self.rows,
            mesh=self.mesh,
            grammar=grammar_of(self.config, pictures=writes),
        )

    def encode(self, prompt: Any, picture: bool = False) -> Encoded:
        """A prompt: a text, or a list of texts and pictures (paths, PIL images, arrays). picture: it begins one."""
        parts = [prompt] if isinstance(prompt, str) else prompt
        segments = [Text(part) if isinstance(part, str) else Image(part) for part in parts]
        c = self.config
        ids = {"begin_id": c.begin_id, "end_id": c.end_id, "image_id": c.image_id, "count": c.visual_tokens}
        return interleave(segments, self.tokenizer, **ids, ended=False, open_picture=picture)

    def generate(
        self,
        prompt: Any,
        *,
        picture: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | int = 0.0,
        top_k: int = 0,
        top_p: float | int = 1.0,
        seed: int = 0,
    ) -> Written:
        """What the model writes behind one prompt; see `generate_batch`."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return self.generate_batch([prompt], picture=picture, max_new_tokens=max_new_tokens, sampling=sampling)[0]

    def generate_batch(
        self,
        prompts: Sequence[Any],
        *,
        picture: bool = False,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> list[Written]:
        """What the model writes behind each prompt, up to its end token or `max_new_tokens` (default: the context).

        A picture is begun only where all of it and the token behind it still fit.

        Args:
          prompts: each a text, or a list of texts and pictures.
          picture: the answers begin with a picture.

        Raises:
          ValueError: settings out of range, a prompt that does not fit the context, a picture that would not be whole,
            or pictures of a model that writes none.
        """
        if picture:
            grammar_of(self.config)  # says why, where the model writes none
        encoded = [self.encode(prompt, picture) for prompt in prompts]
        most = self.config.llm.context - max((len(one.tokens) for one in encoded), default=0)
        most = max(1, most) if max_new_tokens is None else max_new_tokens
        need = self.config.visual_tokens + 1
        if picture and most < need:
            raise ValueError(
                f"max_new_tokens={most} holds no whole picture, which takes {need} tokens; raise it, or shorten the "
                f"prompt (the context is {self.config.llm.context})"
            )
        answers = self.generator.generate(encoded, max_new_tokens=most, sampling=sampling)
        return [self.split(answer.tokens, picture) for answer in answers]

    def split(self, tokens: Sequence[int], picture: bool = False) -> Written:
        """Tokens of an answer as texts and pictures; `picture`: they begin within one."""
        c, out, at = self.config, [], 0
        runs = [c.begin_id, *tokens] if picture else list(tokens)
        while at < len(runs):
            if runs[at] == c.begin_id:
                codes = runs[at + 1 : at + 1 + c.visual_tokens]
                out.append(self.draw([codes])[0])
                at += c.visual_tokens + 2
                continue
            stop = next((i for i in range(at, len(runs)) if runs[i] == c.begin_id), len(runs))
            out.append(self.tokenizer.decode(runs[at:stop]))
            at = stop
        return out

    def draw(self, tokens: Any) -> np.ndarray:
        """Token ids of whole pictures [N, P] as uint8[N, height, width, 3]."""
        pixels = _write(self.generator.model, self.generator.params, jnp.asarray(tokens, jnp.int32))
        return to_uint8(np.asarray(pixels), self.spec)


@functools.partial(jax.jit, static_argnames=("model",))
def _write(model: Unified, params: Params, tokens: Array) -> Array:
    return model.apply({"params": params}, tokens, method="write")


def to_uint8(pixels: Float[np.ndarray, "N tall wide 3"], spec: ImageSpec) -> np.ndarray:
    """Prepared pixels back as colours from 0 to 255: what `spec` did, undone and rounded."""
    plain = (pixels * np.asarray(spec.std) + np.asarray(spec.mean)) / spec.rescale
    return np.clip(np.round(plain), 0, 255).astype(np.uint8)
