"""``config.model`` of a recipe: a vision-language model and what it eats, from the zoo, a folder, or spelled out."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from lvlm_jax import config as configs
from lvlm_jax.api import EXPORT, default_template
from lvlm_jax.config import ConfigError
from lvlm_jax.connectors import CONNECTORS
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.hub import beside
from lvlm_jax.hub.configs import describe, read_json
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.encoder_decoder import EncoderDecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.parts import SenseSection, connector_of, section_of
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.instruction import BERT, InstructionSpec
from lvlm_jax.vision import VisionConfig, check_pictures
from lvlm_jax.zoo import Spec, video_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model and what it eats. `connector` carries a ``kind``, a key of `connectors.CONNECTORS`.

    tokenizer: a folder, a hub name, or "easy_vqa" (built from that data set's words). system: text of the template's
    system turn; None keeps the template's own. video: which frames of a video are shown; each is a picture.
    instruction: the tokenizer of what the connector reads beside a picture, for a Q-Former that reads anything. senses:
    further pairs of encoder and connector, by name.
    """

    vision: VisionConfig
    connector: dict[str, Any]
    llm: DecoderConfig | EncoderDecoderConfig
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
    public: str | None = None
    instruction: InstructionSpec | None = None
    senses: dict[str, SenseSection] = dataclasses.field(default_factory=dict)
    compat_bos_bug: int | None = None

    def __post_init__(self) -> None:
        self.video.check_reads(self.vision.frames, self.newline, self.image.native is not None)
        if self.template not in TEMPLATES:
            raise ConfigError(f"template={self.template!r}: choose one of {list(TEMPLATES)}")
        if (self.vision.values, self.vision.patches) != (self.image.values, self.image.patches):
            raise ConfigError(
                f"image.size={self.image.size}, image.patch={self.image.patch} do not fit vision.image_size="
                f"{self.vision.image_size}, vision.patch_size={self.vision.patch_size}: they must be equal"
            )
        check_pictures(self.vision, self.image)
        if self.newline != (self.image.tiles is not None):
            raise ConfigError(
                f"newline={self.newline} with image.tiles={self.image.tiles}: pictures cut into tiles need the learned "
                "newline, and others have no use for it"
            )
        if not 0 <= self.image_token_id < self.lvlm.vocab:  # the connector is checked here, too
            raise ConfigError(f"image_token_id={self.image_token_id} is outside the vocabulary of {self.lvlm.vocab}")
        if self.lvlm.instructed != (self.instruction is not None):
            raise ConfigError(
                f"instruction={self.instruction} with connector.vocab={self.connector.get('vocab')}: a connector with "
                "a vocabulary reads an instruction, for which it needs a tokenizer, and others read none"
            )
        if self.instruction is not None and self.instruction.length > self.lvlm.connector.context:
            raise ConfigError(
                f"instruction.length={self.instruction.length} is beyond connector.context="
                f"{self.lvlm.connector.context}, the positions that the connector knows"
            )

    @property
    def lvlm(self) -> LVLMConfig:
        """The whole model's sizes."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(LVLMConfig)}
        senses = tuple((name, section.sense(name)) for name, section in self.senses.items())
        return LVLMConfig(**given | {"connector": connector_of(self.connector), "senses": senses})

    @property
    def width(self) -> tuple[str, int]:
        """What a mesh cuts: its field, and how wide it is."""
        return "llm.width", self.llm.width


def model_of(spec: Spec, tokenizer: str | None = None) -> Any:
    """The ``config.model`` of a system of the zoo, every size spelled out so that each can be overridden."""
    names = {type_: name for name, type_ in CONNECTORS.items()}
    out = configs.to_config(spec.config)
    out.connector.kind = names[type(spec.config.connector)]
    del out.senses
    out.senses = {name: configs.to_config(section_of(sense)) for name, sense in spec.config.senses}
    out.image = configs.to_config(spec.image)
    out.video = configs.to_config(spec.video)
    out.tokenizer = tokenizer or spec.tokenizer or spec.source
    out.template = spec.template
    out.image_token_id = spec.image_token_id
    if spec.config.instructed:
        out.instruction = configs.to_config(InstructionSpec(tokenizer=BERT))
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
    if described.config.instructed:
        length = beside.instruction(path, described.config.connector).length
        out.instruction = configs.to_config(InstructionSpec(tokenizer=str(path / beside.CONNECTOR), length=length))
    return out
