"""Which sources there are: the name that a recipe gives, and a small frozen dataclass that holds its fields and opens.

A new source is a file with its class and such a dataclass, and one line here. The fields of all of them lie flat in
`Choice` (and so in the recipe's `Data`), so that ``--config.stages.align.data.path=...`` reaches any of them; a field
that is set but not read by the chosen source is an error.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath

from lvlm_jax.config import ConfigError, near
from lvlm_jax.data.cc_sbu_align import CcSbuAlignFolder
from lvlm_jax.data.coco import CocoFile, ReferFile
from lvlm_jax.data.documents import Mmc4Files, Mmc4TarFiles, ObelicsFiles
from lvlm_jax.data.easy_vqa import EasyVqaSplit
from lvlm_jax.data.emoji import EmojiDrawings
from lvlm_jax.data.files import PATTERN, expand
from lvlm_jax.data.mixture import LlavaYamlFile, Mixture, Part
from lvlm_jax.data.parquet import ParquetFiles
from lvlm_jax.data.sources import LlavaJsonFiles, MessagesFiles, Source, VideoChatFiles
from lvlm_jax.data.tars import TarFiles
from lvlm_jax.data.tfds import TfdsSplit
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.encode import DataError

FILES: dict[str, type] = {
    "easy_vqa": EasyVqaSplit,
    "emoji": EmojiDrawings,
    "llava_json": LlavaJsonFiles,
    "llava_yaml": LlavaYamlFile,
    "messages": MessagesFiles,
    "videochat": VideoChatFiles,
    "coco": CocoFile,
    "refcoco": ReferFile,
    "cc_sbu_align": CcSbuAlignFolder,
    "parquet": ParquetFiles,
    "webdataset": TarFiles,
    "obelics": ObelicsFiles,
    "mmc4": Mmc4Files,
    "mmc4_tar": Mmc4TarFiles,
    "tfds": TfdsSplit,
}
"""Sources of one kind of file."""


def flat(kinds: Mapping[str, type]) -> type:
    """A frozen dataclass with every field of all `kinds`; one that a kind needs has its type's empty value here."""
    found: dict[str, tuple[Any, Any]] = {}
    for kind in kinds.values():
        for field in dataclasses.fields(kind):
            default = field.default
            if default is dataclasses.MISSING:
                empty = typing.get_origin(field.type) or field.type  # dict[str, Member] is made by dict()
                default = empty if empty is dict else empty()
            entry = field.type, default
            if found.setdefault(field.name, entry) != entry:
                raise TypeError(f"{kind.__name__}.{field.name} is {entry}, another source has {found[field.name]}")
    fields = [
        (name, hint, dataclasses.field(**{"default_factory" if value is dict else "default": value}))
        for name, (hint, value) in found.items()
    ]
    return dataclasses.make_dataclass("Flat", fields, frozen=True, kw_only=True)


class _Opens:
    """What a choice among `kinds` does; a dataclass with ``source`` and the flat fields inherits it."""

    kinds: ClassVar[Mapping[str, type]]

    def __post_init__(self) -> None:
        if self.source not in self.kinds:
            raise ConfigError(
                f"source={self.source!r}{near(self.source, self.kinds)}: choose one of {list(self.kinds)}"
            )
        own = {field.name: field for field in dataclasses.fields(self.kinds[self.source])}
        for name, field in own.items():
            if field.default is field.default_factory is dataclasses.MISSING and not getattr(self, name):
                raise ConfigError(f"{name}: {self.source} needs it; give its {name}")
        self._chosen()  # its own checks
        every = {field.name for kind in self.kinds.values() for field in dataclasses.fields(kind)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in every - own.keys() and value != (empty := _default(field)):
                raise ConfigError(
                    f"{field.name}={value!r} is not read by source={self.source!r}, whose fields are "
                    f"{', '.join(own)}; leave it at {empty!r}"
                )

    def _chosen(self) -> Any:
        kind = self.kinds[self.source]
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The conversations. `cache` is a folder for indices; `on_bad` "skip" leaves damaged parts of files out."""
        return self._chosen().open(cache=cache, on_bad=on_bad)

    @property
    def label(self) -> str:
        """What it is, in a word or three: for a line beside a score."""
        fields = (getattr(self, name) for name in ("path", "split", "of") if name in self._fields)
        return " ".join([self.source, *(str(value) for value in fields if value)])

    @property
    def _fields(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self.kinds[self.source])}

    @property
    def own_template(self) -> str:
        """The chat template that the source's records ask for; "" leaves it to the stage."""
        return getattr(self.kinds[self.source], "template", "")

    def absent(self) -> list[str]:
        """What is not there of the files that it names, one ``field=value`` a line."""
        there = lambda value: not value or epath.Path(value).expanduser().exists()  # noqa: E731
        out = []
        if not there(self.path):
            install = getattr(self.kinds[self.source], "install", "").format(path=self.path)
            fix = f"it comes by: {install}" if install else "check the path"
            try:
                expand(self.path, ("",))  # a pattern
            except DataError as error:
                why = f" ({error})" if any(mark in self.path for mark in PATTERN) else ""
                out.append(f"path={self.path!r} does not exist{why}; {fix}")
        if not there(self.images):
            out.append(f"images={self.images!r} does not exist; give the folder that picture paths start from")
        return out


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member(_Opens, flat(FILES)):
    """A source of a mixture: one of `FILES` and its fields.

    sample: which of its records take part (`mixture.sampled`). weight: its share of what is drawn; given for every
    member, or for none, and then an epoch holds every record once. template: how its records are written down, where
    that is not the stage's (documents know their own).
    """

    kinds: ClassVar[Mapping[str, type]] = FILES
    source: str
    sample: str = "all"
    weight: float | None = None
    template: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template and self.template not in TEMPLATES:
            raise ConfigError(f"template={self.template!r}: choose one of {list(TEMPLATES)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOf:
    """The recipe's fields of `Mixture`: a name of your own -> what it is."""

    members: dict[str, Member]

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        opened = {name: (member.open(cache, on_bad), member) for name, member in self.members.items()}
        return Mixture(
            {
                name: Part(source, member.sample, member.weight, member.template or member.own_template)
                for name, (source, member) in opened.items()
            }
        )


SOURCES: dict[str, type] = {**FILES, "mixture": MixtureOf}
"""Every source by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(_Opens, flat(SOURCES)):
    """One of `SOURCES` and its fields."""

    kinds: ClassVar[Mapping[str, type]] = SOURCES
    source: str

    @property
    def member_templates(self) -> tuple[str, ...]:
        """The templates of members that have their own."""
        return tuple(sorted({m.template or m.own_template for m in self.members.values()} - {""}))

    def absent(self) -> list[str]:
        """What is not there of the files that it names, members' too, one ``field=value`` a line."""
        found = [f"members.{name}.{line}" for name, member in self.members.items() for line in member.absent()]
        return super().absent() + found
