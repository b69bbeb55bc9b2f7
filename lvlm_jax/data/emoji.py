"""Emoji drawings: 1,594 concepts, each drawn by four vendors, with name and group, from npm packages.

The packages hold SVG; each drawing is rendered once, on white, into a folder beside them. Licences: Noto Apache-2.0,
Twemoji CC-BY-4.0, Fluent flat MIT, OpenMoji CC-BY-SA-4.0, names by emojibase MIT. A vendor left out of training shows
whether a model knows the thing or the drawing.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from etils import epath

from lvlm_jax.data.files import part_of
from lvlm_jax.data.sources import Numbered
from lvlm_jax.processing import words
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Image, Segment, Text, Turn
from lvlm_jax.progress import bar as progress_bar

VENDORS = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat", "openmoji": "openmoji"}
"""Our name of a vendor -> its package among ``@iconify-json``."""

INSTALL = (
    "npm install --no-save --ignore-scripts --prefix {path} @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 "
    "@iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/openmoji@1.2.29 emojibase-data@17.0.0"
)
NAME, GROUP = "What is this?", "What kind of thing is it?"
"""The two questions."""

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<begin>", "<end>")
"""Of `word_tokenizer`: what stands for a picture's tokens, and around them, are the last three."""

COMPONENTS = 2
"""emojibase's group of skin tones and hair, which are parts of drawings."""


@dataclasses.dataclass(frozen=True)
class Concept:
    """What is drawn: code points without the variation selector, name, group."""

    code: str
    name: str
    group: str


class Emoji(Numbered):
    """Drawings as conversations, a `Source`: every concept that all vendors drew, by every one of `vendors`.

    Args:
      path: the folder that npm installed the packages into (`INSTALL`); drawings are rendered under it.
      vendors: names of `VENDORS`.
      kind: "captions": a picture and its name, no question. "drawings": the name, and the picture as the answer.
        "names": `NAME` and the name. "groups": `GROUP` and one of nine groups. "questions": both, in two rounds.
      size: pixels of each side of a drawing.

    Raises:
      DataError: a package is missing or another version's, an unknown vendor or kind.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        vendors: tuple[str, ...] = tuple(VENDORS),
        kind: str = "questions",
        size: int = 64,
    ):
        if unknown := sorted(set(vendors) - set(VENDORS)):
            raise DataError(f"vendors={unknown}: choose among {list(VENDORS)}")
        if not vendors or len(set(vendors)) < len(vendors):
            raise DataError(f"vendors={vendors!r}: name at least one, each once")
        if kind not in KINDS:
            raise DataError(f"of={kind!r}: choose one of {list(KINDS)}")
        self.path, self.vendors, self.kind, self.size = epath.Path(path), tuple(vendors), kind, size
        icons = {vendor: _icons(self.path, vendor) for vendor in VENDORS}
        self.concepts, self._crc = _concepts(self.path, icons)
        self._folders = [_drawings(self.path, vendor, icons[vendor], self.concepts, size) for vendor in self.vendors]

    def __len__(self) -> int:
        return len(self.concepts) * len(self.vendors)

    def __repr__(self) -> str:
        return (
            f"Emoji({str(self.path)!r}, vendors={self.vendors}, kind={self.kind!r}, size={self.size}, "
            f"examples={len(self)}, crc={self._crc:08x})"
        )

    def origin(self, index: int) -> str:
        """The picture's path."""
        vendor, number = divmod(index, len(self.concepts))
        return str(self._folders[vendor] / f"{self.concepts[number].code}.png")

    def _example(self, index: int) -> Example:
        concept = self.concepts[index % len(self.concepts)]
        rounds = KINDS[self.kind](concept, Image(self.origin(index)))
        turns = [Turn(role=role, segments=said) for pair in rounds for role, said in zip(("user", "assistant"), pair)]
        return Example(turns=tuple(turns), id=f"{self.vendors[index // len(self.concepts)]}/{concept.code}")


Said = tuple[Segment, ...]

KINDS: dict[str, Callable[[Concept, Image], list[tuple[Said, Said]]]] = {
    "captions": lambda concept, picture: [((picture,), (Text(concept.name),))],
    "drawings": lambda concept, picture: [((Text(concept.name),), (picture,))],
    "names": lambda concept, picture: [((picture, Text(NAME)), (Text(concept.name),))],
    "groups": lambda concept, picture: [((picture, Text(GROUP)), (Text(concept.group),))],
    "questions": lambda concept, picture: [
        ((picture, Text(NAME)), (Text(concept.name),)),
        ((Text(GROUP),), (Text(concept.group),)),
    ],
}
"""Kind of record -> the rounds about a concept and its picture, what is asked and what is answered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiDrawings:
    """The recipe's fields of `Emoji`; `of` is its kind."""

    install: ClassVar[str] = INSTALL

    path: str
    vendors: tuple[str, ...] = tuple(VENDORS)
    of: str = "questions"

    def open(self, cache: Any = None, on_bad: str = "raise") -> Emoji:
        """The source."""
        return Emoji(self.path, self.vendors, self.of)


def word_tokenizer(path: str | os.PathLike) -> Any:
    """A tokenizer of the words in the names of all concepts (`processing.words`); `SPECIALS` come first.

    Args:
      path: the folder that npm installed the packages into.
    """
    concepts, _ = _concepts(epath.Path(path), {vendor: _icons(epath.Path(path), vendor) for vendor in VENDORS})
    return words.tokenizer([concept.name for concept in concepts], SPECIALS)


def _code(text: str) -> str:
    """Code points as hexadecimal numbers with dashes, without the variation selector, which not all vendors set."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _read(path: epath.Path, *parts: str) -> tuple[Any, int]:
    """(a package's JSON, its checksum)."""
    file = path.joinpath("node_modules", *parts)
    if not file.is_file():
        raise DataError(f"{file} is missing; the drawings are npm packages: {INSTALL.format(path=path)}")
    data = file.read_bytes()
    return json.loads(data), zlib.crc32(data)


def _icons(path: epath.Path, vendor: str) -> tuple[Mapping[str, Any], dict[str, str], int]:
    """(the set's SVG bodies and sizes, code points -> name in the set, checksum)."""
    icons, crc = _read(path, "@iconify-json", VENDORS[vendor], "icons.json")
    names, _ = _read(path, "@iconify-json", VENDORS[vendor], "chars.json")
    return icons, {_code(code): name for code, name in names.items()}, crc


def _concepts(path: epath.Path, icons: Mapping[str, tuple]) -> tuple[list[Concept], int]:
    """(what every vendor drew, in emojibase's order; a checksum over all packages)."""
    records, crc = _read(path, "emojibase-data", "en", "data.json")
    messages, _ = _read(path, "emojibase-data", "en", "messages.json")
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    found = [
        Concept(_code(record["hexcode"]), record["label"], groups[record["group"]])
        for record in records
        if record.get("group") not in (None, COMPONENTS)
        and all(_code(record["hexcode"]) in names for _, names, _ in icons.values())
    ]
    return found, zlib.crc32(repr((crc, [one for _, _, one in icons.values()])).encode())


def _drawings(path: epath.Path, vendor: str, icons: tuple, concepts: list[Concept], size: int) -> epath.Path:
    """The folder of a vendor's drawings, rendered now where it is not there."""
    bodies, names, crc = icons
    folder = path / "drawings" / f"{vendor}-{size}-{crc:08x}"
    if folder.is_dir():
        return folder
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise DataError("the drawings are SVG; to render them: pip install 'lvlm-jax[emoji]'") from error
    part = part_of(folder)
    part.mkdir(parents=True)
    with progress_bar(len(concepts), f"render {vendor}", unit="drawing") as bar:
        for concept in concepts:
            svg = _svg(bodies, names[concept.code], size)
            pixels = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff")
            (part / f"{concept.code}.png").write_bytes(bytes(pixels))
            bar.update()
    try:
        part.rename(folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise
    return folder


def _svg(icons: Mapping[str, Any], name: str, size: int) -> str:
    """An icon as a square SVG document, one that is no square in its middle; an alias is another icon's drawing."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    given = lambda key, default: icon.get(key, icons.get(key, default))  # noqa: E731
    left, top, width, height = given("left", 0), given("top", 0), given("width", 16), given("height", 16)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}"'
    return f"<svg {spaces} {box}>{icon['body']}</svg>"
