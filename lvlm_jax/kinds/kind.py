"""What a kind of training stage is: one value of functions, so that nothing branches on a kind's name."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax

from lvlm_jax.config import ConfigError, build
from lvlm_jax.evaluate.run import Result
from lvlm_jax.models.lvlm import dummy_batch
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Batch, Encoded, Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSettings:
    """Of a loss that has no numbers to choose."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """What an evaluation is given beside the recipe and the weights.

    samples: (conversation up to an answer, [that answer]) of every answer of its data. out: folder for what it writes,
    None on all processes but the first.
    """

    samples: list[tuple[Example, list[str]]]
    tokenizer: Any
    dtype: Any
    mesh: jax.sharding.Mesh | None = None
    out: Any = None


_BLIND = types.SimpleNamespace(vision=types.SimpleNamespace(patches=0, values=0))
"""The sizes of pictures where there are none."""


def without_senses(example: Example) -> None:
    """DataError for what a named sense would read: a model without any would take it for its own, or trip over it."""
    if any(getattr(segment, "sense", "") for turn in example.turns for segment in turn.segments):
        where = example.origin or f"example {example.id!r}"
        raise DataError(f"{where}: a record for a named sense, and this model has none; leave such records out")


def _nothing(*args: Any) -> None:
    """The default of what a kind need not do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of stage: what ``stages.X.loss`` of a recipe names. A new one is a file and a line in `kinds.KINDS`.

    The recipe and its stages (`recipe.Recipe`, `recipe.StageRecipe`) stand above this package and come as arguments.

    Attributes:
      model: (recipe, options) -> linen module; options are its dtype, scan and remat.
      loss: (model, settings, head_trained, shards) -> `train.step.LossFn`; where the kind `draws`, with a key as its
        third argument.
      section: dataclass of ``config.model``; None for a vision-language model (`recipe.Model`).
      settings: dataclass of the numbers of its loss; a recipe gives some of them as ``stages.X.settings``.
      sizes: recipe -> what `models.lvlm.dummy_batch` takes as a config; None: batches hold no pictures.
      length: recipe -> positions of the smallest batch.
      draws: the loss takes a random key, which follows from the seed and the step alone.
      couples: the loss compares the rows of a batch with one another: microbatches would change it.
      pairs: each row is one example with one picture.
      frozen: dtype of the leaves that stay as they are; None for the one that the recipe computes in.
      int8: whether dense layers may multiply in int8 (``stages.X.matmul``).
      check: (recipe, name, stage) raises ConfigError for what this kind cannot run.
      text: recipe -> the text tower that reads a row's words instead of a language model.
      encoder: (recipe, stage, tokenizer) -> encode(example); None for conversations by their chat template.
      visual_tokens: recipe -> positions of one picture in a row.
      senses: recipe -> how the segments of each named sense are read; None for a kind that has none.
      holds: (recipe, stage) -> what batches hold beside what all do, as `data.loader.Loader` and
        `models.lvlm.dummy_batch` take it: the same in all batches of a stage, so that they have one shape.
      begin: (recipe, stage, model, params, batch, key) -> params: what the first weights become before the first step;
        None leaves them as they are. batch() gives the stage's first batch, the whole of it on every host.
      flops: (recipe, stage, params) -> model FLOPs of one step; None where they are not counted.
      evaluate: (recipe, params, `Asking`) -> scores; None for a model that answers nothing.
      exported: recipe -> what `hub.export.export_folder` takes beside folder, weights and tokenizer; None where no
        folder is known to hold the model.
      public: raises ValueError where a recipe's model, `exported`, would have no config.json.
      hint: (exported folder, samples of the last evaluation) -> the command to try next.
      absent: (recipe, stage) -> what the stage reads beside its data and this machine lacks, a line each.
    """

    model: Callable[[Any, dict[str, Any]], Any]
    loss: Callable[[Any, Any, bool, int], Callable]
    sizes: Callable[[Any], Any] | None = None
    length: Callable[[Any], int] = lambda recipe: 8
    section: type | None = None
    settings: type = NoSettings
    draws: bool = False
    couples: bool = False
    pairs: bool = False
    frozen: Any = None
    int8: bool = False
    check: Callable[[Any, str, Any], None] = _nothing
    text: Callable[[Any], Any] = _nothing
    encoder: Callable[[Any, Any, Any], Callable[[Example], Encoded]] | None = None
    visual_tokens: Callable[[Any], int] = lambda recipe: 0
    senses: Callable[[Any], Any] = _nothing
    holds: Callable[[Any, Any], dict[str, Any]] = lambda recipe, stage: {}
    begin: Callable[..., Any] | None = None
    flops: Callable[[Any, Any, dict], float | None] = _nothing
    evaluate: Callable[[Any, dict, Asking], Result] | None = None
    exported: Callable[[Any], dict[str, Any]] | None = None
    public: Callable[[Any], Any] = _nothing
    hint: Callable[[Any, list[dict]], str] = lambda folder, samples: f"lvlm convert verify {folder}"
    absent: Callable[[Any, Any], list[str]] = lambda recipe, stage: []

    def batch(
        self, recipe: Any, rows: int = 1, length: int | None = None, pictures: int | None = None, **more: Any
    ) -> Batch:
        """A batch of zeros of the right shapes, by default the smallest; `more` is what the kind `holds`."""
        config = _BLIND if self.sizes is None else self.sizes(recipe)
        pictures = int(self.sizes is not None) if pictures is None else pictures
        return dummy_batch(config, rows, length or self.length(recipe), pictures, **more)

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of its loss where a recipe says nothing."""
        return {field.name: field.default for field in dataclasses.fields(self.settings)}

    def unusual(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Of a stage's settings those that are not the default, or not known at all."""
        known = self.defaults
        return {name: value for name, value in settings.items() if name not in known or value != known[name]}

    def settings_of(self, name: str, stage: Any) -> Any:
        """The numbers of a stage's loss, checked. Raises ConfigError naming the field and the choices."""
        return build(self.settings, stage.settings, f"config.stages.{name}.settings")

    def checked(self, recipe: Any, name: str, stage: Any) -> None:
        """Raises ConfigError where this stage cannot be run."""
        at, data = f"stages.{name}", stage.data
        self.settings_of(name, stage)
        if self.couples and stage.accumulate > 1:
            raise ConfigError(
                f"{at}.accumulate={stage.accumulate}: a loss of kind {stage.loss!r} couples all rows of the batch, so "
                "microbatches would change it; use accumulate=1 and more devices"
            )
        if self.pairs and (data.pack or data.pictures != data.rows):
            raise ConfigError(
                f"{at}.data: a stage of kind {stage.loss!r} takes one picture and one text a row, so it needs "
                f"pack=False and pictures=rows; here pack={data.pack}, pictures={data.pictures}, rows={data.rows}"
            )
        if any(data.senses.values()) and self.senses is _nothing:
            raise ConfigError(f"{at}.data.senses: a stage of kind {stage.loss!r} reads no named senses; leave it out")
        if stage.matmul != "float" and not self.int8:
            raise ConfigError(f"{at}.matmul={stage.matmul!r}: a stage of kind {stage.loss!r} multiplies in float alone")
        field = "evaluate" if stage.evaluate else "eval_every"
        if getattr(stage, field) and self.evaluate is None:
            raise ConfigError(f"{at}.{field}: a stage of kind {stage.loss!r} trains no model that could answer")
        self.check(recipe, name, stage)
