"""A conversation with a model: many turns, many pictures."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lvlm_jax.infer.prompt import as_features, as_images, as_videos
from lvlm_jax.processing.image import load_image
from lvlm_jax.processing.schema import Example, Features, Image, Text, Turn
from lvlm_jax.processing.senses import loaded
from lvlm_jax.processing.video import chosen, held


class Chat:
    """A conversation that grows by `ask`; a question that fails leaves it as it was.

    Example:
      >>> chat = system.chat()
      >>> chat.ask("What is this?", images="cat.jpg")
      >>> chat.ask("And how does it differ from this one?", images="dog.jpg")

    Args:
      owner: the `System` that answers, whose `chat` makes this. system: text of the system turn.

    Attributes:
      turns: what was said so far.
    """

    def __init__(self, owner: Any, system: str | None = None):
        self._system = owner
        self._opening = () if system is None else (Turn("system", (Text(system),)),)
        self.turns: tuple[Turn, ...] = self._opening

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.turns = self._opening

    def ask(
        self,
        text: str,
        images: Any = None,
        *,
        videos: Any = None,
        features: Any = None,
        stream: bool = False,
        **settings: Any,
    ) -> str | Iterator[str]:
        """The model's answer, or with `stream` its pieces; `settings` as in `System.generate`.

        A stream that is left early keeps in the conversation what came until then.

        Raises:
          ImageError: a picture or a video that cannot be read.
          ValueError: the conversation does not fit the context any more.
        """
        # Pictures are read now: a file that changes or goes away later must not change what was said.
        limit = self._system.spec.max_pixels
        given = as_images(images)
        read = lambda image: dataclasses.replace(image, source=load_image(image.source, max_pixels=limit))  # noqa: E731
        pictures = tuple(self._kept(image) if image.sense else read(image) for image in given)
        heard = tuple(self._kept(one) for one in as_features(features))
        asked = Example((Turn("user", (*pictures, *as_videos(videos), *heard, Text(text))),), origin="chat")
        turns = (*self.turns, held(chosen(asked, self._system.video, limit)).turns[0])
        answer = self._system.generate(Example(turns, origin="chat"), stream=stream, **settings)
        if stream:
            return self._listen(turns, answer)
        self._remember(turns, answer)
        return answer

    def _kept(self, one: Features | Image) -> Features | Image:
        """What a named sense reads, in memory; what it does not read stays: the prompt's encoding says so."""
        spec = self._system.config.specs.get(one.sense)
        if spec is None or isinstance(one, Features) != (spec.image is None):
            return one
        if isinstance(one, Features):
            return dataclasses.replace(one, source=loaded(one, spec), key="")
        return dataclasses.replace(one, source=load_image(one.source, max_pixels=spec.image.max_pixels))

    def _listen(self, turns: tuple[Turn, ...], pieces: Iterator[str]) -> Iterator[str]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            if said:
                self._remember(turns, said.strip())

    def _remember(self, turns: tuple[Turn, ...], answer: str) -> None:
        self.turns = (*turns, Turn("assistant", (Text(answer),)))
