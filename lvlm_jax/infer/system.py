"""Everything that it takes to ask a model: weights, tokenizer, picture processing and template, in one value."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from lvlm_jax import params as trees
from lvlm_jax.infer import beam
from lvlm_jax.infer.generate import Answer, Generator
from lvlm_jax.infer.prompt import as_example, as_images
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.models.lvlm import LVLM, LVLMConfig
from lvlm_jax.processing.chat_templates import BOS, Piece, Template
from lvlm_jax.processing.encode import encode
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.processing.image import ImageSpec, load_image, to_rows
from lvlm_jax.processing.schema import Clip, Encoded, Example, Image
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.processing.video import chosen
from lvlm_jax.shapes import Float, Params

if TYPE_CHECKING:
    from lvlm_jax.infer.chat import Chat

DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A model that can be asked. `lvlm_jax.load` makes one from a checkpoint.

    Example:
      >>> system.generate("What is this?", images="cat.jpg")
      >>> system.generate(["What differs between ", Path("a.png"), " and ", picture, "?"])
      >>> for piece in system.generate("Tell me more.", images=[a, b], stream=True): print(piece, end="")

    Attributes:
      image_token_id: the id that stands where a picture's tokens go.
      stop_ids: tokens that end an answer, beside the tokenizer's own and the template's.
      rows: the most prompts of one batch.
      mesh: devices to run on.
      video: which frames of a video are shown, and what is said of them.
    """

    model: LVLM
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    spec: ImageSpec
    template: Template
    image_token_id: int
    stop_ids: tuple[int, ...] = ()
    rows: int = 16
    mesh: Mesh | None = None
    name: str = ""
    video: VideoSpec = DEFAULT

    def __post_init__(self):
        vision = self.config.vision
        if (self.spec.patches, self.spec.values) != (vision.patches, vision.values):
            raise ValueError(
                f"pictures come in {self.spec.patches} patches of {self.spec.values} values (size {self.spec.size}, "
                f"patch {self.spec.patch}), but the vision tower reads {vision.patches} of {vision.values}"
            )
        if (self.spec.tiles is not None) != self.config.newline:
            raise ValueError(
                "tiles and the newline go together: the picture processor cuts "
                f"{'tiles' if self.spec.tiles else 'no tiles'}, but the model has newline={self.config.newline}"
            )
        if (self.video.pool == "corner") != self.config.pools_frames:
            raise ValueError(
                f"video.pool={self.video.pool!r} with pools_frames={self.config.pools_frames}: 'corner' is for models "
                "that average a frame's features before the connector, and those take no other"
            )
        if self.video.newline != "none" and not self.config.newline:
            raise ValueError(f"video.newline={self.video.newline!r}: this model learned no newline; use 'none'")

    def __repr__(self) -> str:
        return (
            f"System({self.name!r}: {trees.size(self.params):,} weights, {np.dtype(self.model.dtype).name}, "
            f"{self.spec.size} x {self.spec.size} pictures, template {self.template.name!r}, "
            f"context {self.config.llm.context:,})"
        )

    @property
    def config(self) -> LVLMConfig:
        """Sizes of the model."""
        return self.model.config

    @functools.cached_property
    def generator(self) -> Generator:
        """The engine, its weights one layer at a time; made at the first use."""
        return Generator(
            self.model,
            self.params,
            spec=self.spec,
            pad_id=self.tokenizer.pad_id,
            eos_ids=self._ends[0],
            decode=self.tokenizer.decode,
            rows=self.rows,
            mesh=self.mesh,
        )

    @functools.cached_property
    def _ends(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """(token ids, strings) that end an answer: a template names special tokens and plain strings alike."""
        ids = {*self.stop_ids, *([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])}
        ids |= {self.tokenizer.special_id(s) for s in self.template.stop if self.tokenizer.has_special(s)}
        return tuple(sorted(ids)), tuple(s for s in self.template.stop if not self.tokenizer.has_special(s))

    def encode(self, example: Example) -> Encoded:
        """The prompt of a conversation up to where the answer begins. Raises DataError naming the example's origin."""
        return encode(
            example,
            self.template,
            self.tokenizer,
            self.config.visual_tokens,
            self.image_token_id,
            generate=True,
            embedding_size=self.config.vocab,
            spec=self.spec,
            video=self.video,
        )

    def prompt_text(self, example: Example) -> str:
        """The prompt as text, to print and keep beside a score: ``<image>`` and ``<video>`` where such a one stands."""
        shown = chosen(example, self.video, self.spec.max_pixels)
        pieces = self.template.render(shown.turns, generate=True)
        opening, start = Piece(BOS, special=True), self.tokenizer.hf.bos_token if self.tokenizer.adds_bos else ""
        marks = {True: "<video>", False: "<image>"}
        return "".join(
            marks[isinstance(p.source, Clip)] if isinstance(p, Image) else start if p == opening else p.text
            for p in pieces
        )

    def generate(
        self,
        prompt: Any,
        images: Any = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | int = 0.0,
        top_k: int = 0,
        top_p: float | int = 1.0,
        seed: int = 0,
        beams: int = 1,
        length_penalty: float | int = 1.0,
        stop: Sequence[str] = (),
        system: str | None = None,
        stream: bool = False,
        videos: Any = None,
    ) -> str | Iterator[str]:
        """The answer to one prompt, or with `stream` an iterator over its pieces.

        Args:
          prompt: a text, a list of texts and pictures, or a list of ``{"role", "content"}`` messages. What is typed
            stays text: ``<image>`` or ``</s>`` in it are those characters.
          images: one picture or several (path, PIL image, uint8 array, bytes); any number.
          max_new_tokens: default 256, or what the context has left if that is less.
          temperature: 0 is greedy. top_k, top_p, seed: see `Sampling`.
          beams: above 1 for a beam search, whose pieces come all at the end; length_penalty: see `Beams`.
          stop: strings that end the answer, beside the template's own.
          system: text of the system turn, instead of the template's.
          videos: one video or several (path, bytes, a `Video`), of which the frames that `video` chooses are shown.

        Raises:
          ValueError: settings out of range, a prompt that does not fit the context; ImageError for a bad picture or
            video.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        encoded = self.encode(as_example(prompt, images, system, videos))
        settings = {
            "max_new_tokens": self.room(encoded) if max_new_tokens is None else max_new_tokens,
            "sampling": beam.settings(sampling, beams, length_penalty),
            "stop": self._stops(stop),
        }
        if stream:
            return self.generator.stream(encoded, **settings)
        return self.generator.generate([encoded], rows=1, **settings)[0].text.strip()

    def generate_batch(self, examples: Sequence[Any], **settings: Any) -> list[str]:
        """The answers to many prompts, in order; `answer_batch` has their tokens and how each ended.

        Args:
          examples: each an `Example`, or whatever `generate` takes as a prompt, its pictures in it.
          settings: ``max_new_tokens, sampling, stop, rows`` of `answer_batch`.
        """
        taken = [name for name in inspect.signature(self.answer_batch).parameters if name != "examples"]
        for name in sorted(settings.keys() - set(taken)):
            fixes = {"images": ". Put each picture into its prompt: [[Path('a.png'), 'What is this?'], ...]"}
            fixes |= {"videos": ". Put each video into its prompt: [[Video('a.mp4'), 'What happens?'], ...]"}
            fixes |= {name: f". Give sampling=Sampling({name}=...)" for name in Sampling.__dataclass_fields__}
            fixes |= {"beams": ". Give sampling=Beams(count=...)"}
            fixes |= {name: f". Give sampling=Beams({name}=...)" for name in beam.Beams.__dataclass_fields__}
            raise TypeError(
                f"generate_batch() takes no {name}=; beside the prompts it takes {', '.join(f'{t}=' for t in taken)}"
                f"{fixes.get(name, '')}"
            )
        return [answer.text.strip() for answer in self.answer_batch(examples, **settings)]

    def answer_batch(
        self,
        examples: Sequence[Any],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | beam.Beams | None = None,
        stop: Sequence[str] = (),
        rows: int | None = None,
    ) -> list[Answer]:
        """One `Answer` a prompt (an `Example`, or whatever `generate` takes as a prompt), in order."""
        encoded = [self.encode(as_example(example)) for example in examples]
        if max_new_tokens is None:
            max_new_tokens = min(map(self.room, encoded), default=1)
        return self.generator.generate(
            encoded, max_new_tokens=max_new_tokens, sampling=sampling, stop=self._stops(stop), rows=rows
        )

    def room(self, encoded: Encoded) -> int:
        """New tokens when nobody says how many: 256, or what the context has left (at least 1, which then fails)."""
        return max(1, min(DEFAULT_NEW_TOKENS, self.config.llm.context - len(encoded.tokens)))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The template's ends that are plain strings."""
        return self._ends[1]

    def _stops(self, stop: Sequence[str]) -> tuple[str, ...]:
        return (*self.stop_strings, *((stop,) if isinstance(stop, str) else stop))

    def embed_images(self, images: Any) -> Float[np.ndarray, "N Q D"]:
        """What the language model sees of each picture: Q visual tokens in its width, float32.

        A picture that is cut into tiles gives several of N: the whole of it, then its tiles.
        """
        loaded = [load_image(image.source, max_pixels=self.spec.max_pixels) for image in as_images(images)]
        if not loaded:
            raise ValueError("images: none given")
        patches, positions = zip(*(to_rows(image, self.spec) for image in loaded))
        return self.generator.embed_images(np.concatenate(patches), np.concatenate(positions))

    def chat(self, system: str | None = None) -> "Chat":
        """A conversation of many turns and many pictures."""
        from lvlm_jax.infer.chat import Chat

        return Chat(self, system=system)
