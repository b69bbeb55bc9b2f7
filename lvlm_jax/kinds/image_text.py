"""Stages that pre-train a Q-Former between a frozen tower and BERT's words: BLIP-2's first (contrast, match, caption).

With a P-Former beside it, BLIText's first: the projected queries are also drawn to the prompt of their caption.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lvlm_jax.config import ConfigError
from lvlm_jax.connectors.pformer import PFormerConfig
from lvlm_jax.connectors.qformer import QFormerConfig
from lvlm_jax.evaluate import retrieval
from lvlm_jax.evaluate.run import Result
from lvlm_jax.kinds.initial import absent, initial
from lvlm_jax.kinds.kind import Asking, Kind, without_senses
from lvlm_jax.kinds.language import sweep
from lvlm_jax.models.image_text import ImageText, ImageTextConfig
from lvlm_jax.models.prompted import AlignedImageText
from lvlm_jax.params import is_stacked
from lvlm_jax.processing.captions import bert_ids, caption_of
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.schema import TEXT, Encoded, Example
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.train import losses, pformer_losses, qformer_losses
from lvlm_jax.vision import eva
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo.image_text import bert_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What `qformer_losses.pretraining_losses` takes, and where BERT's weights come from.

    start_id: the word that captions to be written begin with; 30522 is [DEC], which LAVIS adds to BERT's 30,522. tower:
    folder or hub name, in timm's layout, of the EVA tower whose first blocks the tower is; bert: of the BERT that the
    Q-Former begins as; "" for none. align: the weight of `pformer_losses.alignment_loss`, of a model with a P-Former.
    """

    start_id: int = 30522
    tower: str = ""
    bert: str = ""
    gathered: bool = True
    smoothing: float = qformer_losses.SMOOTHING
    align: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextModel:
    """``config.model`` of a Q-Former's pre-training, and what it eats.

    tokenizer: BERT's, a folder or a hub name; its texts are captions, cleaned. projection: width in which pictures and
    texts meet. pformer: beside it, frozen, in the width of the language model that its prompts are for.
    """

    vision: ViTConfig
    qformer: QFormerConfig
    image: ImageSpec
    tokenizer: str
    projection: int = 256
    pformer: PFormerConfig | None = None
    language_width: int = 0

    def __post_init__(self) -> None:
        if self.vision.values != self.image.values or self.vision.patches != self.image.patches:
            raise ConfigError(
                f"image.size={self.image.size}, image.patch={self.image.patch} do not fit vision.image_size="
                f"{self.vision.image_size}, vision.patch_size={self.vision.patch_size}: they must be equal"
            )
        _ = self.config  # its own checks
        if (self.pformer is None) != (self.language_width == 0):
            raise ConfigError(
                f"pformer={'None' if self.pformer is None else 'given'} with language_width={self.language_width}: a "
                "P-Former's prompts are as wide as its language model; give both, or neither"
            )
        if self.pformer is not None and self.pformer.prompt != self.qformer.queries:
            raise ConfigError(
                f"pformer.prompt={self.pformer.prompt}, qformer.queries={self.qformer.queries}: must agree"
            )

    @property
    def config(self) -> ImageTextConfig:
        """The model's sizes."""
        return ImageTextConfig(vision=self.vision, qformer=self.qformer, projection=self.projection)

    @property
    def width(self) -> tuple[str, int]:
        """What a mesh cuts: its field, and how wide it is."""
        return "qformer.width", self.qformer.width


def _model(recipe: Any, options: dict[str, Any]) -> ImageText:
    m = recipe.model
    if m.pformer is None:
        return ImageText(m.config, **options)
    return AlignedImageText(m.config, former=m.pformer, width=m.language_width, **options)


def _check(recipe: Any, name: str, stage: Any) -> None:
    context, aligned = recipe.model.qformer.context, recipe.model.pformer is not None
    settings, vocab = KIND.settings_of(name, stage), recipe.model.qformer.vocab
    if not 0 <= settings.start_id < vocab:
        raise ConfigError(f"stages.{name}.settings.start_id={settings.start_id} is outside the vocabulary of {vocab}")
    if stage.data.length > context:
        raise ConfigError(f"stages.{name}.data.length={stage.data.length} is beyond model.qformer.context={context}")
    if aligned != (settings.align > 0):
        raise ConfigError(
            f"stages.{name}.settings.align={settings.align} with model.pformer "
            f"{'given' if aligned else 'None'}: the alignment takes a P-Former, and a P-Former is here for nothing else"
        )


def written(example: Example, tokenizer: Tokenizer, max_length: int, vocab: int) -> Encoded:
    """A caption in BERT's words with its picture.

    Raises:
      DataError: no caption, or words that the Q-Former has no row for.
    """
    where = example.origin or f"example {example.id!r}"
    without_senses(example)
    try:
        tokens = bert_ids(caption_of(example), tokenizer, max_length)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if tokens.max() >= vocab:
        raise DataError(
            f"{where}: token id {tokens.max()} is outside the vocabulary of {vocab}; is it BERT's tokenizer?"
        )
    ones = np.ones(len(tokens), np.float32)
    return Encoded(tokens, ones, np.full(len(tokens), TEXT, np.int32), example.images)


def _encoder(recipe: Any, stage: Any, tokenizer: Tokenizer) -> Callable[[Example], Encoded]:
    vocab = recipe.model.qformer.vocab
    return functools.partial(written, tokenizer=tokenizer, max_length=stage.data.length, vocab=vocab)


def _loss(model: Any, settings: Settings, head_trained: bool, shards: int) -> Callable:
    """The sum of the means of all losses, and each of them."""

    def image_text(params: dict, batch: Any, key: jax.Array) -> tuple:
        options = {name: getattr(settings, name) for name in ("start_id", "gathered", "smoothing")}
        found: dict = qformer_losses.pretraining_losses(
            model, params, batch, key, **options, **sweep(model), shards=shards
        )
        if settings.align:
            run = functools.partial(model.apply, {"params": params})
            pair = run(run(batch, method="features"), batch.tokens, batch.segments, method="align")
            loss, weight = pformer_losses.alignment_loss(*pair, batch.segments.max(1) > 0)
            found["align"] = settings.align * loss, weight
        means = {name: losses.total(part) for name, part in found.items()}
        return sum(means.values()), 1.0, means

    return image_text


def _begin(recipe: Any, stage: Any, model: Any, params: dict, batch: Callable, key: jax.Array) -> dict:
    settings, m = KIND.settings_of("", stage), recipe.model
    # The norm behind the tower is BLIP-2's own, and trains.
    trunk = [row for row in eva.rows(m.vision) if row.leaves[0].startswith("vision/trunk/")] if settings.tower else []
    params = initial(params, trunk, settings.tower, "settings.tower")
    return initial(params, bert_rows(m.config), settings.bert, "settings.bert")


def _absent(recipe: Any, stage: Any) -> list[str]:
    settings = KIND.settings_of("", stage)
    return absent(settings.tower, "settings.tower") + absent(settings.bert, "settings.bert")


def _evaluate(recipe: Any, params: dict, asking: Asking) -> Result:
    m, ask = recipe.model, recipe.evaluation
    if jax.process_count() > 1:
        raise ConfigError("evaluation: retrieval is scored by one process; run lvlm eval on the finished workdir")
    model = ImageText(m.config, dtype=asking.dtype, scan=is_stacked(params))
    return retrieval.evaluate(
        model,
        {name: part for name, part in params.items() if name not in ("language_projection", "pformer")},
        asking.samples,
        tokenizer=asking.tokenizer,
        spec=m.image,
        length=ask.data.length,
        rows=ask.rows,
        out=asking.out,
        data=ask.data.label,
        name=recipe.name,
    )


KIND = Kind(
    section=ImageTextModel,
    settings=Settings,
    model=_model,
    loss=_loss,
    sizes=lambda recipe: recipe.model.config,
    length=lambda recipe: 4,
    draws=True,
    couples=True,
    pairs=True,
    check=_check,
    encoder=_encoder,
    begin=_begin,
    absent=_absent,
    evaluate=_evaluate,
)
"""ITC, ITM and ITG with negatives from the whole batch; and the alignment with a P-Former."""
