"""A recipe becomes model, stages, data, mesh: frozen values, checked whole before anything runs."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lvlm_jax import config as configs
from lvlm_jax.api import EXPORT, default_template
from lvlm_jax.config import ConfigError, build
from lvlm_jax.connectors import CONNECTORS
from lvlm_jax.data.registry import Choice
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.hub import beside
from lvlm_jax.hub.configs import describe, public_config, read_json
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.mesh import PRESETS, Absent, AnyMesh, make_mesh
from lvlm_jax.models.contrastive import DualEncoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.nn.lora import Lora
from lvlm_jax.nn.stack import REMAT
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.train.optim import OptimizerConfig
from lvlm_jax.train.stages import Average, SpikePolicy, Stage
from lvlm_jax.vision import VisionConfig
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.zoo import Spec, video_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model and what it eats. `connector` carries a ``kind``, a key of `connectors.CONNECTORS`.

    tokenizer: a folder, a hub name, or "easy_vqa" (built from that data set's words). system: text of the template's
    system turn; None keeps the template's own. video: which frames of a video are shown; each is a picture.
    """

    vision: VisionConfig
    connector: dict[str, Any]
    llm: DecoderConfig
    image: ImageSpec
    tokenizer: str
    template: str = "vicuna_v1"
    system: str | None = None
    image_token_id: int = 32000
    attention: Literal["causal", "prefix"] = "causal"
    newline: bool = False
    expert: bool = False
    video: VideoSpec = DEFAULT
    fusion: CrossAttentionConfig | None = None
    words: int = 0
    pools_frames: bool = False
    public: str | None = None

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ConfigError(f"template={self.template!r}: choose one of {list(TEMPLATES)}")
        if self.vision.values != self.image.values or self.vision.patches != self.image.patches:
            raise ConfigError(
                f"image.size={self.image.size}, image.patch={self.image.patch} do not fit vision.image_size="
                f"{self.vision.image_size}, vision.patch_size={self.vision.patch_size}: they must be equal"
            )
        if self.newline != (self.image.tiles is not None):
            raise ConfigError(
                f"newline={self.newline} with image.tiles={self.image.tiles}: pictures cut into tiles need the learned "
                "newline, and others have no use for it"
            )
        if self.video.newline != "none" and not self.newline:
            raise ConfigError(f"video.newline={self.video.newline!r} with newline=False: this model learns none")
        if not 0 <= self.image_token_id < self.lvlm.vocab:  # the connector is checked here, too
            raise ConfigError(f"image_token_id={self.image_token_id} is outside the vocabulary of {self.lvlm.vocab}")

    @property
    def lvlm(self) -> LVLMConfig:
        """The whole model's sizes."""
        fields = dict(self.connector)
        kind = fields.pop("kind", None)
        if kind not in CONNECTORS:
            raise ConfigError(f"connector.kind={kind!r}: choose one of {list(CONNECTORS)}")
        connector = build(CONNECTORS[kind], fields, "config.model.connector")
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(LVLMConfig)}
        return LVLMConfig(**given | {"connector": connector})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTower:
    """What a contrastive stage adds to the model's vision tower: a text tower and the joint width."""

    text: TextTowerConfig
    projection: int | None = None
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a training picture (`processing.image.augment`)."""

    flip: bool = False
    shift: int = 0
    zoom: float = 0.0
    rotate: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("zoom", 1), ("colour", 1), ("rotate", 180.0001)):
            if not 0 <= getattr(self, name) < most:
                raise ConfigError(f"augment.{name}={getattr(self, name)}: from 0 (off) to below {most:g}")

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self != Augment()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Choice):
    """What a stage or an evaluation reads, and the shape of a batch.

    source: a name of `data.registry.SOURCES`; that source's own fields (path, images, ...) stand beside it. rows,
    length: text rows of a global batch and their positions. groups: rows are dealt into so many groups, at least one a
    data shard; pictures: vision rows of a whole batch (one a picture, tile or frame of a video), divided among the
    groups. pack: several examples a row. workers: processes that build batches, 0 for threads alone. on_bad: "raise",
    or "skip" and count. weigh_by: how much an example counts in the loss, a name of `processing.weighting.WEIGHTINGS`.
    """

    template: str | None = None
    rows: int = 8
    length: int = 2048
    groups: int = 1
    pictures: int = 0
    pack: bool = True
    workers: int = 0
    threads: int = 2
    augment: Augment = Augment()
    on_bad: Literal["raise", "skip"] = "raise"
    weigh_by: Literal["token", "sqrt", "example"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and self.template not in TEMPLATES:
            raise ConfigError(f"template={self.template!r}: choose one of {list(TEMPLATES)}")
        if self.rows % self.groups or self.pictures % self.groups:
            raise ConfigError(f"rows={self.rows}, pictures={self.pictures}: must be multiples of groups={self.groups}")


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
    start: part of the model ("vision", "connector", "llm", or "all") -> where it comes from; parts not named start at
    random. evaluate: when the evaluation runs, any of "before", "after".
    """

    trains: tuple[str, ...]
    steps: int
    optimizer: OptimizerConfig
    data: Data
    loss: Literal["language", "contrastive"] = "language"
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

    def stage(self, name: str) -> Stage:
        """The trainer's view of it."""
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(Stage) if f.name != "name"}
        return Stage(name=name, **same)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Free generation over a data set, scored. limit: so many answers of it; 0 takes all.

    Questions are asked in the model's own chat template, whatever the source's records say.
    """

    data: Data
    scores: tuple[str, ...] = ("exact",)
    max_new_tokens: int = 16
    rows: int = 64
    limit: int = 0

    def __post_init__(self) -> None:
        templates = [self.data.template, self.data.own_template, *self.data.member_templates]
        if name := next(filter(None, templates), None):
            raise ConfigError(
                f"evaluation.data: template {name!r} would not be used: questions are asked in the model's own"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    run: the stages' names in order. tensor, fsdp: devices along these axes of the mesh, see `mesh.make_mesh`. dtype and
    scan: "auto" chooses by device. remat: what the backward pass keeps of a layer, a key of `nn.stack.REMAT`.
    hang: seconds without a finished training step after which a process says where it stands and ends; 0: never.
    """

    name: str
    model: Model
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
        """What the export at the end would find: no public family holds a part."""
        try:
            public_config(self.model.lvlm, self.model.image_token_id, self.model.image)
        except ValueError as error:
            raise ConfigError(f"config.export: {error}; choose other values, or set config.export=False") from error

    def _check(self, name: str, stage: StageRecipe) -> None:
        if stage.loss == "contrastive" and self.contrastive is None:
            raise ConfigError(f"stages.{name}.loss='contrastive' needs config.contrastive: the text tower")
        if stage.loss == "contrastive" and (stage.data.pack or stage.data.pictures != stage.data.rows):
            raise ConfigError(
                f"stages.{name}.data: a contrastive loss compares each row's caption with each row's picture, so it "
                f"needs pack=False and pictures=rows; here pack={stage.data.pack}, pictures={stage.data.pictures}, "
                f"rows={stage.data.rows}"
            )
        if stage.loss == "language" and stage.data.length > self.model.llm.context:
            raise ConfigError(
                f"stages.{name}.data.length={stage.data.length} is beyond model.llm.context={self.model.llm.context}, "
                "the positions that the language model knows"
            )
        field = "evaluate" if stage.evaluate else "eval_every"
        if getattr(stage, field) and self.evaluation is None:
            raise ConfigError(f"stages.{name}.{field}={getattr(stage, field)} needs config.evaluation: on what")
        if getattr(stage, field) and stage.loss == "contrastive":
            raise ConfigError(f"stages.{name}.{field}: a contrastive stage trains no language model that could answer")
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
        width, ways = self.model.llm.width, mesh.shape["fsdp"]
        if width % ways:
            raise ConfigError(
                f"config.mesh={self.mesh}: model.llm.width={width:,} does not divide over {ways:,} devices, so each "
                f"would hold the weights whole; {self._fewer(width, ways, mesh.size // ways)}"
            )
        return mesh

    def _fewer(self, width: int, ways: int, beside: int) -> str:
        """What to do where `ways` devices do not divide a width; each of them stands for `beside` of the mesh."""
        common = math.gcd(width, ways)
        fewer = f"cut them over fewer: --config.fsdp={common}" if common > 1 else ""
        if self.fsdp is not None:
            return fewer or f"leave config.fsdp out, or give one that divides {width:,}"
        below = max(n for n in range(1, ways) if width % n == 0)
        above = min((n for n in range(ways, width + 1) if width % n == 0), default=below)
        counts = " or ".join(f"{n * beside:,}" for n in dict.fromkeys((below, above)))
        return f"{fewer and fewer + ', or '}take another number of devices, such as {counts}"

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
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return build(Recipe, plain)


def load(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """A recipe by name or path with ``--config.a.b=value`` overrides."""
    return resolve(configs.load(name, overrides, schema=Recipe))


def model_of(spec: Spec, tokenizer: str | None = None) -> Any:
    """The ``config.model`` of a system of the zoo, every size spelled out so that each can be overridden."""
    out = configs.to_config(spec.config)
    out.connector.kind = next(name for name, kind in CONNECTORS.items() if kind is type(spec.config.connector))
    out.image = configs.to_config(spec.image)
    out.video = configs.to_config(spec.video)
    out.tokenizer = tokenizer or spec.source
    out.template = spec.template
    out.image_token_id = spec.image_token_id
    return out


def model_of_folder(folder: str) -> Any:
    """The ``config.model`` of a vision-language model's folder, or of a finished run's workdir.

    Raises:
      ConfigError: another kind of model, or a folder that does not say how pictures are prepared.
    """
    path = Path(folder)
    path = path / EXPORT if (path / EXPORT / "config.json").is_file() else path
    described = describe(read_json(path / "config.json"), path)
    if described.kind != "lvlm":
        raise ConfigError(f"{path}: holds a model of kind {described.kind!r}, not a vision-language model")
    image = beside.image_spec(path, described.config.vision.patch_size)
    if image is None:
        raise ConfigError(f"{path}: no preprocessor_config.json, so how its pictures were prepared is not known")
    template = beside.chat_template(path) or TEMPLATES[default_template(described.config)]
    source, token = str(path), described.image_token_id
    spec = Spec(
        name=source, config=described.config, image=image, template=template.name, source=source, image_token_id=token
    )
    out = model_of(spec)
    out.system = template.system
    out.video = configs.to_config(beside.video_spec(path, video_of(described.config)))
    return out
