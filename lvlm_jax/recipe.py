"""A recipe becomes model, stages, data, mesh: frozen values, checked whole before anything runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Union

from lvlm_jax import config as configs
from lvlm_jax.config import ConfigError, build, near
from lvlm_jax.data.registry import Choice
from lvlm_jax.kinds import KINDS, SECTIONS
from lvlm_jax.kinds.contrastive import TextTower
from lvlm_jax.mesh import PRESETS, Absent, AnyMesh, make_mesh, remedy
from lvlm_jax.models.contrastive import DualEncoderConfig
from lvlm_jax.nn.lora import Lora
from lvlm_jax.nn.stack import REMAT
from lvlm_jax.parts import APART, NAMED
from lvlm_jax.processing.augment import Augment
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.recipe_model import Model
from lvlm_jax.train.optim import OptimizerConfig
from lvlm_jax.train.stages import Average, SpikePolicy, Stage

AnyModel = Union[(Model, *SECTIONS)]
"""What ``config.model`` may be: a vision-language model, or what a kind of stages brings (`kinds`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Choice):
    """What a stage or an evaluation reads, and the shape of a batch.

    source: a name of `data.registry.SOURCES`; that source's own fields (path, images, ...) stand beside it. rows,
    length: text rows of a global batch and their positions. groups: rows are dealt into so many groups, at least one a
    data shard; pictures: vision rows of a whole batch (one a picture, tile or frame of a video), divided among the
    groups; senses: the same of each named sense. pack: several examples a row. workers: processes that build batches, 0
    for threads alone. on_bad: "raise", or "skip" and count. weigh_by: how much an example counts in the loss, a name of
    `processing.weighting.WEIGHTINGS`.
    """

    template: str | None = None
    rows: int = 8
    length: int = 2048
    groups: int = 1
    pictures: int = 0
    pack: bool = True
    workers: int = 0
    threads: int = 2
    augment: Augment = dataclasses.field(default_factory=Augment)
    on_bad: Literal["raise", "skip"] = "raise"
    weigh_by: Literal["token", "sqrt", "example"] = "token"
    senses: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and self.template not in TEMPLATES:
            raise ConfigError(f"template={self.template!r}: choose one of {list(TEMPLATES)}")
        if self.rows % self.groups or self.pictures % self.groups:
            raise ConfigError(f"rows={self.rows}, pictures={self.pictures}: must be multiples of groups={self.groups}")
        for name, rows in self.senses.items():
            if rows < 0 or rows % self.groups:
                raise ConfigError(f"senses.{name}={rows}: must be a multiple of groups={self.groups}")

    def check_divides(self, where: str, shards: int, microbatches: int = 1) -> None:
        """Raises ConfigError where the batch does not divide over so many data shards; `where` names these data."""
        for name, ways in (("rows", shards), ("groups", shards * microbatches)):
            if getattr(self, name) % ways:
                parts = f"{shards} data shards" + (f" in {microbatches} microbatches" if ways > shards else "")
                raise ConfigError(
                    f"{where}.{name}={getattr(self, name)} does not divide over {parts}; give "
                    f"--config.{where}.{name}= a multiple of {ways}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a part of the model comes from: exactly one of the three.

    stage: an earlier stage of this run. workdir: the end of another run (``lvlm train``'s folder). hub: a folder or hub
    name in a public layout, with its revision.
    """

    stage: str = ""
    workdir: str = ""
    hub: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in ("stage", "workdir", "hub") if (value := getattr(self, name))}
        if len(given) != 1:
            said = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            clear = "; set the other to nothing, as in --config.stages.X.start.all.stage=" if given else ""
            raise ConfigError(f"give exactly one of stage, workdir, hub; here {said}{clear}")

    @property
    def origin(self) -> str:
        """In words."""
        return f"stage {self.stage}" if self.stage else self.workdir or self.hub


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One stage: what trains, on what, for how long, from where.

    lora: low-rank adapters that train beside what `trains` takes (then `trains` may be empty). average: a moving
    average of the trained leaves. profile: first and last step of a profiler's trace. matmul: in what numbers dense
    layers multiply, see `nn.quant.trained_in`.
    start: part of the model ("vision", "connector", "llm", "all", or a path below one, such as "senses/audio") -> where
    it comes from; what is not named starts at random. evaluate: when the evaluation runs, any of "before", "after".
    loss: the kind of stage, a name of `kinds.KINDS`; settings: numbers of that loss, fields of the kind's own.
    """

    trains: tuple[str, ...]
    steps: int
    optimizer: OptimizerConfig
    data: Data
    loss: str = "language"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: dict[str, Start] = dataclasses.field(default_factory=dict)
    lora: Lora | None = None
    average: Average | None = None
    accumulate: int = 1
    log_every: int = 10
    save_every: int = 0
    keep: int = 2
    eval_every: int = 0
    evaluate: tuple[Literal["before", "after"], ...] = ()
    spike: SpikePolicy = dataclasses.field(default_factory=SpikePolicy)
    profile: tuple[int, ...] = ()
    matmul: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        if self.loss in KINDS:  # what is left out and what is given as the default are the same recipe
            object.__setattr__(self, "settings", KINDS[self.loss].unusual(self.settings))

    @staticmethod
    def fill(config: Any) -> None:
        """Adds the kind's settings that a ConfigDict leaves out, so that each can be overridden."""
        for name, value in KINDS[config.loss].defaults.items() if config.loss in KINDS else ():
            config.settings[name] = config.settings.get(name, value)

    def stage(self, name: str) -> Stage:
        """The trainer's view of it."""
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(Stage) if f.name != "name"}
        return Stage(name=name, **same)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Free generation over a data set, scored. limit: so many answers, 0 for all. temperature: 0 is greedy.

    Questions are asked in the model's own chat template, whatever the source's records say.
    """

    data: Data
    scores: tuple[str, ...] = ("exact",)
    max_new_tokens: int = 16
    rows: int = 64
    limit: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: 0 (greedy) or above")
        templates = [self.data.template, self.data.own_template, *self.data.member_templates]
        if name := next(filter(None, templates), None):
            raise ConfigError(
                f"evaluation.data: template {name!r} would not be used: questions are asked in the model's own"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    run: the stages' names in order. beside: workdir of another run whose losses the report draws beside this one's.
    tensor, fsdp: devices along these axes of the mesh, see `mesh.make_mesh`. dtype and scan: "auto" chooses by device.
    remat: what the backward pass keeps of a layer, a key of `nn.stack.REMAT`.
    hang: seconds without a finished training step after which a process says where it stands and ends; 0: never.
    """

    name: str
    model: AnyModel
    stages: dict[str, StageRecipe]
    run: tuple[str, ...]
    contrastive: TextTower | None = None
    evaluation: Evaluation | None = None
    seed: int = 0
    mesh: str = "DP"
    tensor: int | None = None
    fsdp: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    scan: Literal["auto", "yes", "no"] = "auto"
    remat: str = "none"
    log_to: tuple[str, ...] = ()
    export: bool = True
    report: bool = True
    hang: float = 1800.0
    beside: str = ""

    def __post_init__(self) -> None:
        if self.mesh not in PRESETS:
            raise ConfigError(f"mesh={self.mesh!r}: choose one of {list(PRESETS)}")
        if self.hang < 0:
            raise ConfigError(f"hang={self.hang}: seconds, or 0 for never")
        if self.remat not in REMAT:
            raise ConfigError(f"remat={self.remat!r}: choose one of {list(REMAT)}")
        if unknown := [name for name in self.run if name not in self.stages]:
            raise ConfigError(f"run names {unknown}, which is no stage; the stages are {list(self.stages)}")
        for name, stage in self.stages.items():
            try:
                stage.stage(name)  # its own checks
            except ValueError as error:
                raise ConfigError(f"config.{error}") from error
            self._check(name, stage)
        if self.export:
            self._check_export()

    def _check_export(self) -> None:
        """What the export at the end would find: no public family holds a part, or a whole model of this kind."""
        for name in self.run[-1:]:
            kind, loss = KINDS[self.stages[name].loss], self.stages[name].loss
            try:
                if kind.exported is None:
                    raise ValueError(f"stages.{name} of kind {loss!r} trains no whole model")
                kind.public(self)
            except ValueError as error:
                raise ConfigError(f"config.export: {error}; choose other values, or set config.export=False") from error

    def _check(self, name: str, stage: StageRecipe) -> None:
        if stage.loss not in KINDS:
            raise ConfigError(
                f"stages.{name}.loss={stage.loss!r}{near(stage.loss, KINDS)}: choose one of {list(KINDS)}"
            )
        wanted = KINDS[stage.loss].section or Model
        if not isinstance(self.model, wanted):
            raise ConfigError(
                f"stages.{name}.loss={stage.loss!r} trains what {wanted.__name__} describes, but config.model has the "
                f"fields of {type(self.model).__name__}"
            )
        known = list(getattr(self.model, "senses", ()))
        if unknown := sorted(stage.data.senses.keys() - set(known)):
            raise ConfigError(f"stages.{name}.data.senses names {unknown}; the senses of config.model are {known}")
        field = "evaluate" if stage.evaluate else "eval_every"
        if getattr(stage, field) and self.evaluation is None:
            raise ConfigError(f"stages.{name}.{field}={getattr(stage, field)} needs config.evaluation: on what")
        KINDS[stage.loss].checked(self, name, stage)
        before = self.run[: self.run.index(name)] if name in self.run else tuple(self.stages)
        for part, start in stage.start.items():
            if start.stage and start.stage not in before:
                raise ConfigError(self._not_before(f"stages.{name}.start.{part}", start.stage))

    def _not_before(self, where: str, stage: str) -> str:
        """That a stage begins with one that does not run before it, and how it can begin."""
        if stage not in self.stages:
            return f"{where}.stage={stage!r}: no such stage; the stages are {list(self.stages)}"
        return (
            f"{where}.stage={stage!r} does not run before; in config.run={self.run} name {stage!r} before it, or start "
            f"from what another run left: --config.{where}.stage= --config.{where}.workdir=WORKDIR/{stage}"
        )

    def make_mesh(self, devices: Sequence[Any] | Absent | None = None) -> AnyMesh:
        """Its mesh over these devices, default all.

        Raises:
          ConfigError: devices that do not divide into such a mesh, or a model that does not divide over it.
        """
        try:
            mesh = make_mesh(self.mesh, devices, self.tensor, self.fsdp)
        except ValueError as error:
            raise ConfigError(f"config.mesh={self.mesh}: {error}") from error
        (field, width), ways = self.model.width, mesh.shape["fsdp"]
        if width % ways:
            raise ConfigError(
                f"config.mesh={self.mesh}: model.{field}={width:,} does not divide over {ways:,} devices, so each "
                f"would hold the weights whole; {remedy(width, ways, mesh.size // ways, self.fsdp)}"
            )
        return mesh

    @property
    def dual_encoder(self) -> DualEncoderConfig:
        """The model of a contrastive stage."""
        c = self.contrastive
        return DualEncoderConfig(vision=self.model.vision, text=c.text, projection=c.projection, bias=c.bias)


def resolve(config: Any) -> Recipe:
    """A ConfigDict, which is no `Mapping`, or a plain nested one as a checked `Recipe`.

    Raises:
      ConfigError: names the field, what is wrong with it, and the choices.
    """
    return build(Recipe, config.to_dict() if hasattr(config, "to_dict") else dict(config))


def load(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """A recipe by name or path with ``--config.a.b=value`` overrides; `parts.NAMED`: what a name stands for."""
    return resolve(configs.load(name, overrides, schema=Recipe, named=NAMED, apart=APART))
