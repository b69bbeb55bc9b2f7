"""easy-VQA: 5,000 pictures of one coloured shape with 48,248 questions, from the pip package of that name.

Only the package's files are read; it is never imported. 74 % of the answers are yes or no, and an answerer that never
looks scores 67.0 % on the test split. Source: github.com/vzhou842/easy-VQA (MIT).
"""

import dataclasses
import functools
import importlib.util
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from lvlm_jax.processing import words
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.picture import load_image
from lvlm_jax.processing.schema import Example, Features, Image, Segment, Text, Turn
from lvlm_jax.shapes import Float

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
SPLITS = ("train", "validation", "test")
HOLDOUT = 400
"""Validation is the last 400 training pictures, so that nothing is chosen on the test split."""

Attributes = tuple[str | None, str | None]
"""What the questions give away about a picture: (colour, shape), None where they leave it open."""


class EasyVqa:
    """One split of easy-VQA as conversations, a `Source`.

    Args:
      split: "train" without the held-out pictures, "validation" (those), or "test".
      kind: "questions": a picture, a question, an answer. "captions": a picture and "a red circle", where the questions
        give both words; "partial_captions": those and "a triangle" or "a red shape". "text": no picture: the caption
        in the picture's place, once to be said again and once for every question.
      turns: questions a conversation ("questions" only); each question is used once, in an order set by `seed`.
      holdout: how many of the last training pictures are validation's and not train's; default 400.
      sense: the model's named sense that reads `cells` of the picture, computed here, instead of the picture.

    Raises:
      DataError: the package is not installed, or a picture's questions contradict one another.
    """

    def __init__(
        self,
        split: str = "train",
        kind: str = "questions",
        turns: int = 1,
        seed: int = 0,
        holdout: int | None = None,
        sense: str = "",
    ):
        makers = {
            "questions": self._question_records,
            "captions": self._caption_records,
            "partial_captions": self._caption_records,
            "text": self._text_records,
        }
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; valid: {', '.join(map(repr, SPLITS))}")
        if kind not in makers:
            raise DataError(f"unknown kind {kind!r}; valid: {', '.join(map(repr, makers))}")
        if turns < 1 or (turns > 1 and kind != "questions"):
            raise DataError(f"turns={turns} with kind={kind!r}: turns is at least 1, and above 1 only for 'questions'")
        self.split, self.kind, self.turns, self.seed, self.sense = split, kind, turns, seed, sense
        self.holdout = HOLDOUT if holdout is None else holdout
        self._folder = _folder() / ("test" if split == "test" else "train")
        self._pictures, self._crc = _questions(self._folder / "questions.json")
        if split != "test":
            cut = len(self._pictures) - self.holdout
            if not 0 <= cut <= len(self._pictures):
                raise DataError(f"holdout={self.holdout}: there are {len(self._pictures)} training pictures")
            numbers = sorted(self._pictures)[slice(cut) if split == "train" else slice(cut, None)]
            self._pictures = {number: self._pictures[number] for number in numbers}
        self._records: list[tuple[int, tuple[tuple[str, str], ...]]] = makers[kind]()

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return (
            f"EasyVqa({self.split!r}, kind={self.kind!r}, turns={self.turns}, seed={self.seed}, "
            f"holdout={self.holdout}, {f'sense={self.sense!r}, ' if self.sense else ''}examples={len(self)}, "
            f"crc={self._crc:08x})"
        )

    def origin(self, index: int) -> str:
        """Which picture record `index` is about."""
        return f"easy_vqa/{self._folder.name}/images/{self._records[index][0]}.png (example {index})"

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = index.__index__()
        number, rounds = self._records[index]
        turns = []
        for position, (question, answer) in enumerate(rounds):
            asked: tuple[Segment, ...] = (Text(question),) if question else ()
            if position == 0 and self.kind != "text":
                picture = str(self._folder / "images" / f"{number}.png")
                asked = (Features(cells(picture), self.sense) if self.sense else Image(picture), *asked)
            turns += [Turn(role="user", segments=asked), Turn(role="assistant", segments=(Text(answer),))]
        return Example(turns=tuple(turns), id=f"{self.split}/{index}", origin=self.origin(index))

    @property
    def captions(self) -> dict[int, str]:
        """Picture number -> caption; partial ones too unless `kind` is "captions"."""
        found = {}
        for number, rounds in self._pictures.items():
            colour, shape = attributes(rounds, f"easy_vqa/{self._folder.name}/images/{number}.png")
            if (colour and shape) or (self.kind != "captions" and (colour or shape)):
                found[number] = " ".join(word for word in ("a", colour, shape or "shape") if word)
        return found

    def _question_records(self) -> list:
        records = []
        for number, rounds in self._pictures.items():
            if self.turns > 1:
                rounds = [rounds[i] for i in np.random.default_rng([self.seed, number]).permutation(len(rounds))]
            for start in range(0, len(rounds), self.turns):
                records.append((number, tuple(rounds[start : start + self.turns])))
        return records

    def _caption_records(self) -> list:
        return [(number, (("", caption),)) for number, caption in self.captions.items()]

    def _text_records(self) -> list:
        records = []
        for number, caption in self.captions.items():
            records.append((number, ((caption, caption),)))
            records += [(number, ((f"{caption} {question}", answer),)) for question, answer in self._pictures[number]]
        return records


@dataclasses.dataclass(frozen=True, kw_only=True)
class EasyVqaSplit:
    """The recipe's fields of `EasyVqa`; `of` is its kind."""

    split: str = "train"
    of: str = "questions"
    turns: int = 1
    sense: str = ""

    def open(self, cache: Any = None, on_bad: str = "raise") -> EasyVqa:
        """The source."""
        return EasyVqa(self.split, kind=self.of, turns=self.turns, sense=self.sense)


CELLS = (16, 6)
"""Vectors of a picture's `cells`, and values of each."""


@functools.lru_cache(maxsize=8192)
def cells(picture: str) -> Float[np.ndarray, "n C"]:
    """Features of a picture that no tower sees: mean and deviation of the colours of 4 x 4 cells, row by row."""
    pixels = np.asarray(load_image(picture), np.float32) / 127.5 - 1
    height, width = pixels.shape[0] // 4, pixels.shape[1] // 4
    apart = pixels[: 4 * height, : 4 * width].reshape(4, height, 4, width, 3)
    return np.concatenate([apart.mean((1, 3)), apart.std((1, 3))], axis=-1).reshape(CELLS)


def attributes(rounds: Iterable[tuple[str, str]], origin: str = "") -> Attributes:
    """What a picture's (question, answer) pairs say together: (colour, shape), None where more than one is left.

    An answer that is a colour or a shape fixes it, and so does the word inside such a question ("what is the blue
    shape?"). A yes/no question says present = (the answer is yes) XOR (the question holds "not" or "no").
    DataError when nothing is left.
    """
    left = {"colour": set(COLOURS), "shape": set(SHAPES)}
    for question, answer in rounds:
        words = question.lower().rstrip("?").split()
        named = [("colour" if word in COLOURS else "shape", word) for word in words if word in COLOURS + SHAPES]
        if answer in ("yes", "no"):
            present = (answer == "yes") != bool({"not", "no"} & set(words))
        else:
            present = True
            named.append(("colour" if answer in COLOURS else "shape", answer))
        for kind, word in named:
            left[kind] = left[kind] & {word} if present else left[kind] - {word}
            if not left[kind]:
                raise DataError(f"{origin}: the questions contradict one another on {kind} at {question!r}: {answer!r}")
    colour, shape = (next(iter(words)) if len(words) == 1 else None for words in left.values())
    return colour, shape


def word_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of whole words, built from the training questions and answers: 35 tokens, the same ids every time.

    Ids: the specials, then the role words, then the words in alphabetical order. "?" is a word of its own; "<" and ">"
    are cut off, so that a typed ``<image>`` cannot become the special token. A sequence starts with ``<s>``.
    """
    pictures, _ = _questions(_folder() / "train" / "questions.json")
    said = {text for rounds in pictures.values() for pair in rounds for text in pair}
    return words.tokenizer(said, SPECIALS, ROLES)


def _folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("easy-VQA is not installed; run: pip install 'lvlm-jax[quickstart]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def _questions(path: Path) -> tuple[dict[int, list[tuple[str, str]]], int]:
    """(picture number -> its (question, answer) pairs in file order, the file's checksum)."""
    if not path.is_file():
        raise DataError(f"{path} is missing; reinstall the pictures: pip install --force-reinstall 'easy-vqa==1.0'")
    data = path.read_bytes()
    pictures: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads(data):
        pictures.setdefault(number, []).append((question, answer))
    return pictures, zlib.crc32(data)
