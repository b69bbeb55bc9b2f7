"""Boxes as text, both ways: how PaliGemma, MiniGPT-v2, Qwen-VL and CogVLM say where a thing is.

A `Box` holds shares of the picture; a `Form` says them on its grid and in its marks. What a model writes is read back
with every box that is broken named, or left out and counted.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

EDGES = ("y0", "x0", "y1", "x1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle on a picture: its upper, left, lower and right edge as shares of height and width, and what it holds.

    codes: the 16 shape codes of the mask inside it (`vision.mask_codec`), none where only the rectangle is known.

    Raises:
      ValueError: an edge outside [0, 1], or edges the wrong way round.
    """

    y0: float | int
    x0: float | int
    y1: float | int
    x1: float | int
    label: str = ""
    codes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in EDGES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside the picture: edges are shares, 0 to 1")
        for first, last, side in (("y0", "y1", "above"), ("x0", "x1", "left of")):
            if getattr(self, first) > getattr(self, last):
                raise ValueError(f"{last}={getattr(self, last)} lies {side} {first}={getattr(self, first)}")

    @property
    def edges(self) -> tuple[float | int, ...]:
        """(y0, x0, y1, x1)."""
        return self.y0, self.x0, self.y1, self.x1

    @property
    def area(self) -> float | int:
        """Its share of the picture."""
        return (self.y1 - self.y0) * (self.x1 - self.x0)

    def pixels(self, width: int, height: int) -> tuple[float | int, ...]:
        """(left, top, right, bottom) on a picture of that size."""
        return self.x0 * width, self.y0 * height, self.x1 * width, self.y1 * height


def from_pixels(
    left: float | int,
    top: float | int,
    right: float | int,
    bottom: float | int,
    width: int,
    height: int,
    label: str = "",
) -> Box:
    """A box of a picture's pixels; what reaches over the picture's edge (annotations do, by fractions) is cut off.

    Raises:
      ValueError: nothing of it lies on the picture.
    """
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        raise ValueError(
            f"the box from ({left}, {top}) to ({right}, {bottom}) holds no part of {width} x {height} pixels"
        )
    inside = lambda value, size: min(max(value / size, 0.0), 1.0)  # noqa: E731
    return Box(
        y0=inside(top, height), x0=inside(left, width), y1=inside(bottom, height), x1=inside(right, width), label=label
    )


class Attempt(NamedTuple):
    """What stands in a text where a box should be: the words of its numbers, of its codes, its label, and all of it."""

    numbers: list[str]
    codes: list[str]
    label: str
    text: str
    whole: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A way of writing boxes down.

    steps: an edge is its share times this, rounded. most: the largest number there is. order: the edges as they follow
    one another. reserved: characters that no label may hold. codes: whether shape codes can be said. find: the places
    of a text where a box begins. say: boxes in words, given each box's numbers.
    """

    steps: int
    most: int
    order: tuple[str, str, str, str]
    reserved: str
    find: Callable[[str], Iterator[Attempt]]
    say: Callable[[Sequence[tuple[Box, list[int]]]], str]
    codes: bool = False


class Parsed(NamedTuple):
    """The boxes of a text in order, and how many were left out because they are broken."""

    boxes: list[Box]
    skipped: int


def write_boxes(boxes: Sequence[Box], form: str) -> str:
    """Boxes as a model of that form says them.

    Args:
      form: a key of `FORMS`.

    Raises:
      ValueError: an unknown form, a label with a character that the form reserves, codes where it has none.
    """
    chosen = form_named(form)
    for number, box in enumerate(boxes, start=1):
        if clash := sorted(set(box.label) & set(chosen.reserved)):
            raise ValueError(
                f"box {number}: the label {box.label!r} holds {clash[0]!r}, which the form {form} reserves"
            )
        if box.codes and not chosen.codes:
            raise ValueError(f"box {number}: the form {form} has no shape codes; only paligemma says masks")
        if box.codes:
            _check_codes(list(map(str, box.codes)), f"box {number}")
    return chosen.say([(box, _numbers(box, chosen)) for box in boxes])


def read_boxes(text: str, form: str, on_bad: Literal["raise", "skip"] = "raise") -> Parsed:
    """The boxes in a text, whatever else it says.

    Args:
      form: a key of `FORMS`.
      on_bad: what to do with a box of too few or too many numbers, a number off the grid, edges the wrong way round.

    Raises:
      ValueError: a broken box, saying which number of which box is wrong; only with "raise".
    """
    chosen, boxes, skipped = form_named(form), [], 0
    for number, attempt in enumerate(chosen.find(text), start=1):
        try:
            boxes.append(_box(attempt, chosen, f"box {number} ({attempt.text.strip()[:80]!r})"))
        except ValueError:
            if on_bad == "raise":
                raise
            skipped += 1
    return Parsed(boxes, skipped)


def form_of(text: str) -> str | None:
    """The form in which a text says boxes, or None where it says none: no form's marks look like another's."""
    return next((name for name, form in FORMS.items() if next(form.find(text), None)), None)


def form_named(name: str) -> Form:
    """A form by name; ValueError for one that there is not."""
    if name not in FORMS:
        raise ValueError(f"unknown form of boxes {name!r}; choose from {', '.join(FORMS)}")
    return FORMS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def _numbers(box: Box, form: Form) -> list[int]:
    return [min(round(getattr(box, edge) * form.steps), form.most) for edge in form.order]


def _box(attempt: Attempt, form: Form, where: str) -> Box:
    if len(attempt.numbers) != 4:
        raise ValueError(f"{where}: {len(attempt.numbers)} numbers, a box has 4 ({', '.join(form.order)})")
    if not attempt.whole:
        raise ValueError(f"{where}: its end is missing; was the answer cut off?")
    edges = {}
    for edge, word in zip(form.order, attempt.numbers):
        if not re.fullmatch(r"\d+", word, re.ASCII):
            raise ValueError(f"{where}: {edge} is {word!r}, which is no number from 0 to {form.most}")
        if int(word) > form.most:
            raise ValueError(f"{where}: {edge}={word} is off the grid, whose largest number is {form.most}")
        edges[edge] = int(word)
    for first, last, side in (("y0", "y1", "above"), ("x0", "x1", "left of")):
        if edges[first] > edges[last]:
            raise ValueError(f"{where}: {last}={edges[last]} lies {side} {first}={edges[first]}")
    codes = _check_codes(attempt.codes, where) if attempt.codes else ()
    return Box(**{edge: value / form.steps for edge, value in edges.items()}, label=attempt.label, codes=codes)


CODES, SHAPES = 16, 128
"""Shape codes of a mask, and how many different ones there are."""


def _check_codes(words: list[str], where: str) -> tuple[int, ...]:
    if len(words) != CODES:
        raise ValueError(f"{where}: {len(words)} shape codes, a mask has {CODES}")
    for place, word in enumerate(words, start=1):
        if not re.fullmatch(r"\d+", word, re.ASCII) or int(word) >= SHAPES:
            raise ValueError(f"{where}: shape code {place} is {word!r}, which is no number from 0 to {SHAPES - 1}")
    return tuple(map(int, words))


# ---------------------------------------------------------------------------------------------------------------------
# Forms

_PALIGEMMA = re.compile(r"(?P<places>(?:<loc[^<>\s]*>\s*)+)(?P<shapes>(?:<seg[^<>\s]*>\s*)*)(?P<label>[^;<]*)")
_MINIGPT = re.compile(r"(?:<p>(?P<label>[^<]*)</p>\s*|\s*<delim>\s*)?\{\s*(?P<body><[^{}]*)(?P<end>\}?)")
_QWEN = re.compile(
    r"(?:<ref>(?P<label>[^<]*)</ref>\s*)?"
    r"(?:<box>(?P<body>[^<]*)(?P<end></box>)?|(?P<bare>\(\s*\d+\s*,\s*\d+\s*\)\s*,\s*\(\s*\d+\s*,\s*\d+\s*\)))"
)
_COGVLM = re.compile(r"\[\[(?P<body>[^\[\]]*)(?P<end>(?:\]\])?)")


def _find_paligemma(text: str) -> Iterator[Attempt]:
    for found in _PALIGEMMA.finditer(text):
        places, shapes = (
            re.findall(rf"<{name}([^<>\s]*)>", found[part]) for name, part in (("loc", "places"), ("seg", "shapes"))
        )
        yield Attempt(places, shapes, found["label"].strip(), found[0])


def _say_paligemma(boxes: Sequence[tuple[Box, list[int]]]) -> str:
    def one(box: Box, numbers: list[int]) -> str:
        tokens = [*(f"<loc{n:04}>" for n in numbers), *(f"<seg{code:03}>" for code in box.codes)]
        return "".join(tokens) + (f" {box.label}" if box.label else "")

    return " ; ".join(one(*pair) for pair in boxes)


def _find_minigpt(text: str) -> Iterator[Attempt]:
    for found, label in _with_labels(_MINIGPT, text):
        yield Attempt(re.findall(r"<([^<>]*)>", found["body"]), [], label, found[0], bool(found["end"]))


def _say_minigpt(boxes: Sequence[tuple[Box, list[int]]]) -> str:
    one = lambda numbers: "{" + "".join(f"<{n}>" for n in numbers) + "}"  # noqa: E731
    said = lambda label: f"<p>{label}</p> " if label else ""  # noqa: E731
    return " ".join(said(label) + "<delim>".join(map(one, group)) for label, group in _by_label(boxes))


def _find_qwen(text: str) -> Iterator[Attempt]:
    for found, label in _with_labels(_QWEN, text):
        words = [word for word in re.split(r"[\s(),]+", found["bare"] or found["body"]) if word]
        yield Attempt(words, [], label, found[0], bool(found["bare"] or found["end"]))


def _say_qwen(boxes: Sequence[tuple[Box, list[int]]]) -> str:
    one = lambda n: f"<box>({n[0]},{n[1]}),({n[2]},{n[3]})</box>"  # noqa: E731
    said = lambda label: f"<ref>{label}</ref>" if label else " "  # noqa: E731
    return "".join(said(label) + "".join(map(one, group)) for label, group in _by_label(boxes)).lstrip()


def _find_cogvlm(text: str) -> Iterator[Attempt]:
    after = 0
    for found in _COGVLM.finditer(text):
        label, after = text[after : found.start()].strip(), found.end()
        for body in found["body"].split(";"):
            yield Attempt([word.strip() for word in body.split(",")], [], label, found[0], bool(found["end"]))


def _say_cogvlm(boxes: Sequence[tuple[Box, list[int]]]) -> str:
    one = lambda numbers: ",".join(f"{n:03}" for n in numbers)  # noqa: E731
    return " ".join(f"{label}[[{';'.join(map(one, group))}]]" for label, group in _by_label(boxes))


def _with_labels(pattern: re.Pattern, text: str) -> Iterator[tuple[re.Match, str]]:
    """Each match and its label; boxes with nothing between them share the first one's."""
    label, after = "", 0
    for found in pattern.finditer(text):
        if found["label"] is not None:
            label = found["label"].strip()
        elif found.start() != after:
            label = ""
        after = found.end()
        yield found, label


def _by_label(boxes: Sequence[tuple[Box, list[int]]]) -> list[tuple[str, list[list[int]]]]:
    """Runs of boxes of one label."""
    runs: list[tuple[str, list[list[int]]]] = []
    for box, numbers in boxes:
        if not runs or runs[-1][0] != box.label:
            runs.append((box.label, []))
        runs[-1][1].append(numbers)
    return runs


_ACROSS = ("x0", "y0", "x1", "y1")

FORMS: dict[str, Form] = {
    "paligemma": Form(
        steps=1023, most=1023, order=EDGES, reserved=";<", find=_find_paligemma, say=_say_paligemma, codes=True
    ),
    "minigptv2": Form(steps=100, most=100, order=_ACROSS, reserved="<", find=_find_minigpt, say=_say_minigpt),
    "qwen_vl": Form(steps=999, most=999, order=_ACROSS, reserved="<", find=_find_qwen, say=_say_qwen),
    "cogvlm": Form(steps=1000, most=999, order=_ACROSS, reserved="[]", find=_find_cogvlm, say=_say_cogvlm),
}
"""Forms by name.

paligemma: ``<loc0010><loc0020><loc0500><loc0600> cat ; ...``, sixteen ``<seg000>`` behind the places where a mask is
known. Source: big_vision, pp/proj/paligemma/segmentation.py.

minigptv2: ``<p>cat</p> {<2><1><60><50>}``; boxes of one phrase are parted by ``<delim>``. Source: MiniGPT-4,
eval_scripts/eval_ref.py; the authors' training data cut numbers off where we round.

qwen_vl: ``<ref>cat</ref><box>(20,10),(599,500)</box>``; the marks may be absent, as where special tokens are left out.
Source: Qwen-VL, eval_mm/evaluate_grounding.py (which divides by 999).

cogvlm: ``cat[[020,010,600,500]]``; boxes of one phrase are parted by ``;``, and the label read is all that was said
since the box before. Source: CogVLM, utils/utils/grounding_parser.py (which divides by 1000).
"""
