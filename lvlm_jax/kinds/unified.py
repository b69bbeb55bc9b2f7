"""Stages that train one transformer over text and picture tokens (`models.unified`)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from lvlm_jax.config import ConfigError
from lvlm_jax.evaluate import drawings
from lvlm_jax.evaluate.run import Result
from lvlm_jax.hub.configs import public_config
from lvlm_jax.infer.interleaved import InterleavedSystem
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.kinds.kind import Asking, Kind, without_senses
from lvlm_jax.kinds.language import sweep, within_context
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.params import is_stacked
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.interleaved import interleave
from lvlm_jax.processing.schema import Encoded, Example
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.train import flops
from lvlm_jax.train.unified import token_loss
from lvlm_jax.vision.vq import VQConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """z_loss: see `losses.language_loss`; Chameleon takes 1e-5, 0 is off."""

    z_loss: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnifiedModel:
    """``config.model`` of one transformer over text and picture tokens, and what it eats.

    tokenizer: as `recipe.Model`'s. first_code: the token that stands for code 0 of a picture; the other codes follow.
    The rest as `models.unified.UnifiedConfig`'s.
    """

    vision: VQConfig
    llm: DecoderConfig
    image: ImageSpec
    tokenizer: str
    first_code: int
    begin_id: int
    end_id: int
    image_id: int
    text_only: bool = False

    def __post_init__(self) -> None:
        if self.vision.values != self.image.values or self.vision.patches != self.image.patches:
            raise ConfigError(
                f"image.size={self.image.size}, image.patch={self.image.patch} do not fit vision.image_size="
                f"{self.vision.image_size} in codes of {self.vision.patch_size} pixels: they must be equal"
            )
        _ = self.config  # its own checks

    @property
    def config(self) -> UnifiedConfig:
        """The whole model's sizes."""
        words = {name: getattr(self, name) for name in ("begin_id", "end_id", "image_id", "text_only")}
        codes = tuple(range(self.first_code, self.first_code + self.vision.codes))
        return UnifiedConfig(vision=self.vision, llm=self.llm, code_ids=codes, **words)

    @property
    def image_token_id(self) -> int:
        """What stands where a picture's tokens go."""
        return self.image_id

    @property
    def width(self) -> tuple[str, int]:
        """What a mesh cuts: its field, and how wide it is."""
        return "llm.width", self.llm.width


def written(example: Example, tokenizer: Tokenizer, max_length: int, **ids: int) -> Encoded:
    """The texts and pictures of an example in order, whoever says them; every token but the first is a target.

    Args:
      max_length: the most tokens; a picture cannot be cut.
      ids: what `interleave` takes of a picture's words.

    Raises:
      DataError: a video, too many tokens, or a tokenizer without the words that begin and end a text.
    """
    where = example.origin or f"example {example.id!r}"
    without_senses(example)
    if example.videos:
        raise DataError(f"{where}: a video, but this model's pictures are runs of tokens; leave such records out")
    try:
        encoded = interleave([part for turn in example.turns for part in turn.segments], tokenizer, **ids)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if len(encoded.tokens) > max_length:
        raise DataError(
            f"{where}: {len(encoded.tokens)} tokens do not fit max_length {max_length}, and a picture of "
            f"{ids['count']} tokens cannot be cut; raise data.length or leave such records out"
        )
    encoded.weights[:1] = 0  # packed, it would be predicted from the example to the left
    return encoded


def _encoder(recipe: Any, stage: Any, tokenizer: Tokenizer) -> Callable[[Example], Encoded]:
    m = recipe.model
    if tokenizer.vocab_size > m.first_code:
        raise ConfigError(
            f"model.first_code={m.first_code}, but the tokenizer has {tokenizer.vocab_size} words, whose ids would be "
            f"those of pictures; set first_code={tokenizer.vocab_size} or more, and llm.vocab {m.vision.codes} above it"
        )
    ids = {"begin_id": m.begin_id, "end_id": m.end_id, "image_id": m.image_id, "count": m.vision.patches}
    return functools.partial(written, tokenizer=tokenizer, max_length=stage.data.length, **ids)


def _loss(model: Any, settings: Settings, head_trained: bool, shards: int) -> Callable:
    return token_loss(model, z_loss=settings.z_loss, head_trained=head_trained, shards=shards, **sweep(model))


def _flops(recipe: Any, stage: Any, params: dict) -> float:
    mask = stage.stage("x").mask(params)
    sizes = {"rows": stage.data.rows, "length": stage.data.length}
    return flops.decoder_flops(recipe.model.llm, params["llm"], mask["llm"], **sizes)


def _evaluate(recipe: Any, params: dict, asking: Asking) -> Result:
    m, ask = recipe.model, recipe.evaluation
    system = InterleavedSystem(
        model=Unified(m.config, dtype=asking.dtype, scan=is_stacked(params)),
        params=params,
        tokenizer=asking.tokenizer,
        spec=m.image,
        mesh=asking.mesh,
        name=recipe.name,
    )
    return drawings.evaluate(
        system,
        asking.samples,
        scores=ask.scores,
        batch_rows=ask.rows,
        max_new_tokens=ask.max_new_tokens,
        sampling=Sampling(temperature=ask.temperature, seed=recipe.seed),
        progress=asking.out is not None,
        out=asking.out,
        data=ask.data.label,
    )


KIND = Kind(
    section=UnifiedModel,
    settings=Settings,
    model=lambda recipe, options: Unified(recipe.model.config, **options),
    loss=_loss,
    sizes=lambda recipe: recipe.model.config,
    frozen="float32",  # a tokenizer of rounded weights would read other codes than it was trained to write
    check=within_context,
    encoder=_encoder,
    visual_tokens=lambda recipe: recipe.model.vision.patches,
    flops=_flops,
    evaluate=_evaluate,
    hint=lambda folder, samples: f"lvlm generate {folder} --prompt '' --temperature 1 --draw drawn.png",
    exported=lambda recipe: {"config": recipe.model.config, "image_spec": recipe.model.image},
    public=lambda recipe: public_config(recipe.model.config),
)
"""Next-token cross-entropy over text and picture tokens, with a z-loss."""
