"""What a vision-language model is made of, and what goes with what."""

import dataclasses
import math
from typing import Literal

from lvlm_jax.connectors import ConnectorConfig, MergerConfig
from lvlm_jax.fusion import visual_expert
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.encoder_decoder import EncoderDecoderConfig
from lvlm_jax.models.senses import Sense, check_width
from lvlm_jax.processing.senses import SenseSpec
from lvlm_jax.vision import NativeViTConfig, VisionConfig

_TAKEN = ("image", "video")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LVLMConfig:
    """The three parts, and how text attends: "causal", or "prefix" (all before the first target sees itself whole).

    llm: a decoder, or an encoder-decoder (BLIP-2 on Flan-T5), whose encoder reads the prefix of each example while its
    decoder writes the rest; such a one needs attention="prefix".
    newline: pictures are cut into tiles, and a learned token ends each row of their grid (LLaVA-NeXT).
    expert: the decoder's layers have weights of their own for the positions of pictures, and a picture begins and ends
    with a learned vector (CogVLM's visual expert, `fusion.visual_expert`).
    fusion: gated cross-attention between the decoder's layers, instead of soft tokens in the text.
    words: so many words beyond the decoder's vocabulary, in matrices of their own beside its (Idefics).
    public: the public ``model_type`` to write where several hold the same parts; None takes the first that does.
    senses: further pairs of encoder and connector by name (`models.senses`); vision and connector are the first.
    compat_bos_bug: the id of a start token in whose embedding's place each value is that id itself, as VideoChat's
    instruction tuning had it (videochat_it.py writes the id where the embedding belongs); None looks it up.
    """

    vision: VisionConfig
    connector: ConnectorConfig
    llm: DecoderConfig | EncoderDecoderConfig
    attention: Literal["causal", "prefix"] = "causal"
    newline: bool = False
    expert: bool = False
    fusion: CrossAttentionConfig | None = None
    words: int = 0
    public: str | None = None
    senses: tuple[tuple[str, Sense], ...] = ()
    compat_bos_bug: int | None = None

    def __post_init__(self) -> None:
        if self.two_stacks:
            wrong = [name for name in ("expert", "fusion", "words") if getattr(self, name)]
            if wrong or self.attention != "prefix":
                raise ValueError(
                    f"llm is an encoder-decoder, with attention={self.attention!r}, {wrong or 'nothing'} set: its "
                    "encoder sees a prefix whole, and knows neither expert, fusion nor words beside its own; set "
                    "attention='prefix' and leave those out"
                )
        self._check_senses()
        if (made := self.connector.tokens(self.vision.features)) % self.vision.frames:
            raise ValueError(
                f"{made} visual tokens of a clip do not divide among its frames={self.vision.frames} vision rows; "
                "choose another number of frames, or of the connector's queries"
            )
        if self.expert:
            visual_expert.check(self.llm)
            if self.newline or self.attention != "causal":
                raise ValueError(
                    f"expert=True with newline={self.newline}, attention={self.attention!r}: a visual expert sees "
                    "whole pictures, causally; set newline=False and attention='causal'"
                )
        if self.expert and self.fusion is not None:
            raise ValueError("expert=True with fusion: a visual expert works on soft tokens; choose one of the two")
        if self.newline and self.fusion is not None:
            raise ValueError(
                "newline=True with fusion: a newline ends a row of soft tokens, and cross-attention has none"
            )
        if self.words and self.fusion is None:
            raise ValueError(f"words={self.words}: where pictures are soft tokens, new words are rows of llm.vocab")
        if self.words and (self.llm.final_softcap is not None or self.llm.scale_embeddings):
            raise ValueError(
                f"words={self.words}: words beside a decoder's own are neither scaled nor capped, as its own are here "
                f"(scale_embeddings={self.llm.scale_embeddings}, final_softcap={self.llm.final_softcap}); grow "
                "llm.vocab instead"
            )
        self._check_axes()
        if self.newline and math.isqrt(self.visual_tokens) ** 2 != self.visual_tokens:
            raise ValueError(
                f"newline=True with {self.visual_tokens} visual tokens of a picture, which is no square: tiles make "
                "one grid only where each is one (set class_feature=False, or choose another connector)"
            )

    def _check_axes(self) -> None:
        """What goes with pictures at their own resolution, and with positions along several axes."""
        taps, tapped = len(getattr(self.vision, "taps", ())), self.deepstack
        if taps != tapped:
            raise ValueError(
                f"the tower has {taps} tapped layers (vision.taps), but the connector reads {tapped} (connector.taps); "
                "they must be equal"
            )
        if tapped > self.llm.depth:
            raise ValueError(f"{tapped} tapped layers for a decoder of depth={self.llm.depth}: each goes behind one")
        if (tapped or self.mrope) and (self.newline or self.expert or self.fusion is not None):
            raise ValueError(
                f"llm.mrope={self.mrope}, taps={tapped}: they go with soft tokens alone; leave out newline, expert "
                "and fusion"
            )
        if self.mrope and len(self.mrope) != 3:
            raise ValueError(f"llm.mrope={self.mrope}: pictures amid text are counted by time, row and column")

    @property
    def mrope(self) -> tuple[int, ...] | None:
        """How the decoder's rotation is shared among the axes it counts along; None for one, or for none."""
        return getattr(self.llm, "mrope", None)

    @property
    def deepstack(self) -> int:
        """To how many of the decoder's layers a tapped layer of the tower is added."""
        return self.connector.taps if isinstance(self.connector, MergerConfig) else 0

    def _check_senses(self) -> None:
        names = [name for name, _ in self.senses]
        for name in names:
            if not name.isidentifier() or name in _TAKEN or names.count(name) > 1:
                raise ValueError(
                    f"senses: {name!r}: a name is letters, digits and _, there once, and not {' or '.join(_TAKEN)}, "
                    "which records mark pictures and videos with"
                )
        if self.fusion is None:
            check_width(self.connector, self.vision.width, self.llm.width, "connector", "vision")
        for name, sense in self.senses:
            at = f"senses.{name}"
            check_width(sense.connector, sense.encoder.width, self.llm.width, f"{at}.connector", f"{at}.encoder")

    @property
    def specs(self) -> dict[str, SenseSpec]:
        """How the segments of each named sense are read."""
        return {name: sense.spec for name, sense in self.senses}

    @property
    def visual_tokens(self) -> int:
        """Text positions of one vision row (Q), a picture or a tile of one; 1 where text looks at them (`fusion`)."""
        return self.row_tokens if self.fusion is None else 1

    @property
    def row_tokens(self) -> int:
        """Visual tokens of one vision row, in the text or beside it."""
        made = self.connector.tokens(self.vision.features) // self.vision.frames
        return made + (visual_expert.ENDS if self.expert else 0)

    @property
    def two_stacks(self) -> bool:
        """Whether the language model reads with one stack and writes with another."""
        return isinstance(self.llm, EncoderDecoderConfig)

    @property
    def instructed(self) -> bool:
        """Whether the connector reads a text beside each picture (InstructBLIP's Q-Former)."""
        return getattr(self.connector, "vocab", None) is not None

    @property
    def shares_pictures(self) -> bool:
        """Whether texts may share a vision row: not where an expert, or a range of pictures, needs one of its own.

        Nor where the connector reads it beside a text, which may be another, or pictures of one text share rows.
        """
        apart = self.expert or self.instructed or isinstance(self.vision, NativeViTConfig)
        return not apart and (self.fusion is None or self.fusion.scope == "last")

    @property
    def vocab(self) -> int:
        """All words: the decoder's, and those beside."""
        return self.llm.vocab + self.words

    @property
    def decoding(self) -> tuple[str, ...]:
        """The parts of the parameters that a step of decoding reads."""
        return ("llm", *(("fusion",) if self.fusion else ()), *(("words",) if self.words else ()))
