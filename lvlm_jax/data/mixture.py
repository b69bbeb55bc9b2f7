"""Several sources as one: which of their records take part, and how often each source is drawn."""

import bisect
import dataclasses
import math
import os
import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from lvlm_jax.data.packing import Shares
from lvlm_jax.data.sources import LlavaJson, Numbered, Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example
from lvlm_jax.shapes import Int

_SAMPLE = re.compile(r"(first|end|random):(\d+)(%?)")


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of a mixture, which of its records take part (`sampled`), its share of what is drawn, its template."""

    source: Source
    sample: str = "all"
    weight: float | None = None
    template: str = ""


class Mixture(Numbered):
    """The records of several sources, one numbering after the other.

    Args:
      parts: name -> part. Either none has a weight, and an epoch holds every record once; or all have one, and `shares`
        tells the packing plan how to draw. An epoch then has as many examples as the parts hold together, each part its
        weight's share of them; a part's records come in an order of their own, every one before any comes again, and
        where an epoch ends in the middle of a part the next goes on from there.

    Weights are no part of `repr`: lengths that were measured for one choice of them serve the next.
    """

    def __init__(self, parts: Mapping[str, Part]):
        if not parts:
            raise DataError("members: a mixture needs at least one; name them")
        weights = [part.weight for part in parts.values()]
        for name, part in parts.items():
            if (part.weight is None) != (weights[0] is None):
                raise DataError(f"members.{name}.weight={part.weight}: give every member a weight, or none of them")
            if part.weight is not None and not 0 < part.weight < math.inf:
                raise DataError(f"members.{name}.weight={part.weight} must be above 0; leave the member out instead")
        self.parts = dict(parts)
        self._numbers = [sampled(len(part.source), part.sample, name) for name, part in self.parts.items()]
        self._listed = [*self.parts.values()]
        self._ends = np.cumsum([len(numbers) for numbers in self._numbers]).tolist()
        sizes = tuple(len(numbers) for numbers in self._numbers)
        self.shares = None if weights[0] is None else Shares(sizes=sizes, weights=tuple(weights))
        self.left_out: dict[str, int] = {}
        for name, part in self.parts.items():
            for reason, count in getattr(part.source, "left_out", {}).items():
                self.left_out[f"{reason} ({name})"] = count

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        parts = (f"{name}={part.source!r}[{part.sample}]{part.template}" for name, part in self.parts.items())
        return f"Mixture({', '.join(parts)})"

    def _place(self, index: int) -> tuple[Part, int]:
        place = bisect.bisect_right(self._ends, index)
        numbers = self._numbers[place]
        return self._listed[place], int(numbers[index - (self._ends[place] - len(numbers))])

    def origin(self, index: int) -> str:
        """Where the record stands in its own source."""
        part, number = self._place(index)
        return part.source.origin(number)

    def _example(self, index: int) -> Example:
        part, number = self._place(index)
        example = part.source[number]
        return dataclasses.replace(example, template=part.template) if part.template else example


def sampled(size: int, sample: str, name: str = "") -> Int[np.ndarray, " n"]:
    """The numbers of the records that take part, in order.

    sample: "all", "first:N", "end:N" or "random:N", N a count or, with "%", a share of them (rounded up). The random
    choice is the same for every run: the run's seed orders records, it does not choose them. Source: LLaVA-NeXT,
    train.py, `sampling_strategy`.
    """
    if sample == "all":
        return np.arange(size)
    where = f"members.{name}.sample={sample!r}" if name else f"sample={sample!r}"
    match = _SAMPLE.fullmatch(sample)
    if not match:
        raise DataError(f"{where}: write all, first:N, end:N or random:N, N a count or a share like 10%")
    kind, number, percent = match.groups()
    count = math.ceil(int(number) * size / 100) if percent else int(number)
    if not 0 < count <= size:
        raise DataError(f"{where} asks for {count:,} of {size:,} records")
    if kind == "random":
        return np.sort(np.random.default_rng([size, count]).permutation(size)[:count])
    return np.arange(count) if kind == "first" else np.arange(size - count, size)


class LlavaYaml(Mixture):
    """A LLaVA-NeXT YAML: ``datasets: [{json_path, sampling_strategy}]``; pictures of all lie under `images`."""

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None):
        import yaml

        file = epath.Path(path)
        if not file.is_file():
            raise DataError(f"{file} does not exist; give the path of a YAML with 'datasets'")
        try:
            listed = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise DataError(f"{file}: broken YAML ({' '.join(str(error).split())[:160]})") from None
        entries = listed.get("datasets") if isinstance(listed, dict) else None
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{file}: no list 'datasets'; write datasets: [{{json_path: ..., sampling_strategy: ...}}]")
        parts: dict[str, Part] = {}
        for number, entry in enumerate(entries):
            unknown = sorted(entry.keys() - {"json_path", "sampling_strategy"}) if isinstance(entry, dict) else ["?"]
            if unknown or "json_path" not in entry:
                raise DataError(f"{file}: datasets[{number}] must hold json_path and sampling_strategy, and only them")
            source = LlavaJson(file.parent / entry["json_path"], images=images or file.parent)
            parts[f"datasets[{number}]"] = Part(source, str(entry.get("sampling_strategy", "all")))
        super().__init__(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaYamlFile:
    """The recipe's fields of `LlavaYaml`."""

    path: str
    images: str = ""

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return LlavaYaml(self.path, images=self.images or None)
