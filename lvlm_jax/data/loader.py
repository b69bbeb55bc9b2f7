"""Batches for a training run: batch k is the same arrays on any number of hosts, workers and threads.

Whole batches are the items of the grain data set, each a function of k alone, so how many workers fetch them cannot
change their order, and the only data state that a checkpoint needs is k.
"""

import atexit
import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lvlm_jax.data.check import Encode, origin_of
from lvlm_jax.data.collate import collate
from lvlm_jax.data.lengths import Measured, fingerprint, measure_lengths
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.senses import Budget
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import ImageSpec, load_image, to_rows
from lvlm_jax.processing.schema import Batch, Clip, Encoded, Image, SenseRows
from lvlm_jax.processing.senses import SenseSpec
from lvlm_jax.processing.video import read_rows, spec_of
from lvlm_jax.processing.weighting import weighted
from lvlm_jax.shapes import Int

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["LateLoader", "Loader", "Measured", "fingerprint", "measure_lengths"]

Augment = Callable[["PIL.Image.Image", np.random.Generator], "PIL.Image.Image"]
_FOREVER = 1 << 40  # batches; grain wants a length
_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()  # streams of this process that are not closed yet


class Loader:
    """The batches of a run, built by grain threads or worker processes, this host's groups only.

    Args:
      source: conversations by number.
      encode: `Example` -> `Encoded`, with template, tokenizer and sizes bound (`functools.partial`).
      spec: how a picture becomes patches; None for text alone.
      plan: which examples form which batch; its numbers are those of `source`.
      visual_tokens: Q, as bound in `encode`.
      pad_id: token that fills the rest of a row.
      host, hosts: this process and how many there are; `hosts` divides the plan's groups.
      workers: processes that build batches; 0 builds them in this one.
      threads: threads of each process.
      keep_bytes: decoded pictures (by path) kept in memory up to so many bytes a process; 0 keeps none.
      weigh_by: how much an example counts in the loss, a name of `processing.weighting.WEIGHTINGS`.
      instruction: S, as `collate` takes it.
      augment: (PIL picture, rng) -> PIL picture; the generator is seeded by (plan seed, k, row, picture).
      blend: as `collate` takes it.
      senses: how the segments of named senses are read, as bound in `encode`.
      budget: the room of a group, by which the plan was made; default the plan's vision rows for pictures alone.
      pictures: vision rows of each example; default those of the plan, which with named senses counts in other units.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        spec: ImageSpec | None,
        *,
        plan: PackingPlan,
        visual_tokens: int,
        pad_id: int,
        host: int = 0,
        hosts: int = 1,
        workers: int = 0,
        threads: int = 4,
        augment: Augment | None = None,
        keep_bytes: int = 128 * 2**20,
        weigh_by: str = "token",
        blend: bool | None = None,
        instruction: int = 0,
        senses: Mapping[str, SenseSpec] | None = None,
        budget: Budget | None = None,
        pictures: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    ):
        if len(plan.lengths) != len(source):
            raise ValueError(f"{len(plan.lengths)} lengths in the plan but {len(source)} records; measure again")
        if plan.groups % hosts:
            raise ValueError(f"{plan.groups} groups do not divide among {hosts} hosts; make groups a multiple")
        if not 0 <= host < hosts:
            raise ValueError(f"host {host} of {hosts}: hosts are numbered from 0")
        self.source, self.encode, self.spec, self.plan = source, encode, spec, plan
        self.visual_tokens, self.pad_id, self.augment, self.weigh_by = visual_tokens, pad_id, augment, weigh_by
        self.host, self.hosts, self.workers, self.threads = host, hosts, workers, threads
        self.blend, self.instruction = blend, instruction
        self.senses, self.budget = senses or {}, budget or Budget(pictures=plan.vision_rows)
        self.pictures = plan.pictures if pictures is None else np.asarray(pictures)
        self._kept: dict[str, PIL.Image.Image] = {}
        self._room = keep_bytes

    def __repr__(self) -> str:
        return f"Loader({self.source!r}, {self.plan!r}, host={self.host}, hosts={self.hosts})"

    def build(self, k: int) -> Batch:
        """This host's part of batch `k`."""
        share = self.plan.rows // self.hosts
        first = self.host * share
        rows = self.plan.batch(k)[first : first + share]
        return collate(
            [[self._encode(index) for index in row] for row in rows],
            length=self.plan.length,
            groups=self.plan.groups // self.hosts,
            vision_rows=self.budget.pictures,
            visual_tokens=self.visual_tokens,
            pad_id=self.pad_id,
            spec=self.spec,
            picture=lambda image, row, j: self._picture(image, k, first + row, j),
            blend=self.blend,
            instruction=self.instruction,
            senses=self.senses,
            sense_rows=self.budget.senses,
        )

    def iterate(self, start: int = 0) -> Generator[tuple[int, Batch], None, None]:
        """(k, this host's part of batch k) for k = start, start + 1, ... without end.

        Close the iterator (``it.close()``, or `contextlib.closing`) to stop its threads and processes. Worker processes
        import the main module, so a script that uses them needs ``if __name__ == "__main__":``.
        """
        batches = self._stream(start)
        _close_at_exit(batches)
        return batches

    def _stream(self, start: int) -> Generator[tuple[int, Batch], None, None]:
        import grain

        grain_set = grain.MapDataset.source(_Batches(self, start)).to_iter_dataset(
            grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
        )
        if self.workers:
            _mark_flags_parsed()
            grain_set = grain_set.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
            )
        items = iter(grain_set)
        try:
            for k in itertools.count(start):
                yield k, self._received(next(items))
        finally:
            items.close()

    def _received(self, arrays: dict[str, np.ndarray]) -> Batch:
        """A `Batch` of plain numpy arrays.

        What workers send lives in shared memory that ends with grain's wrapper, while the CPU backend may go on reading
        the array in place: so it is copied once, and no wrapper outlives this call.
        """
        return _batch_of({name: np.array(a) for name, a in arrays.items()} if self.workers else arrays)

    def _encode(self, index: int) -> Encoded:
        try:
            encoded = self.encode(self.source[index])
        except Exception as error:
            raise self._with_origin(error, index) from error
        planned = int(self.plan.lengths[index]), int(self.plan.pictures[index])
        if planned != (len(encoded.tokens), int(self.budget.cost(encoded.vision_rows, encoded.sense_rows))):
            raise DataError(
                f"{origin_of(self.source, index)}: {len(encoded.tokens)} tokens and {encoded.vision_rows} pictures "
                f"(tiles and frames counted), but the plan was made for {planned[0]} and {planned[1]}; data or "
                "template changed, measure again (lvlm train --restart does)"
            )
        return weighted(encoded, self.weigh_by)

    def _with_origin(self, error: Exception, index: int) -> DataError:
        origin = origin_of(self.source, index)
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return DataError(text if text.startswith(origin) else f"{origin}: {text}")

    def _picture(self, image: Image, k: int, row: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        change = None
        if self.augment is not None:  # all frames of a clip alike
            change = lambda one: self.augment(one, np.random.default_rng([self.plan.seed or 0, k, row, j]))  # noqa: E731
        try:
            if isinstance(image.source, Clip):
                return read_rows(image, self.spec, change)
            picture = self._opened(image)
            return to_rows(picture if change is None else change(picture), spec_of(image, self.spec))
        except Exception as error:
            raise self._with_origin(error, self._owner(k, row, j)) from error

    def _opened(self, image: Image) -> "PIL.Image.Image":
        """The decoded picture; those of small data sets stay in memory (`keep_bytes`), since each epoch reads them."""
        if not isinstance(image.source, str):
            return load_image(image, max_pixels=self.spec.max_pixels)
        kept = self._kept.get(image.source)
        if kept is None:
            kept = load_image(image, max_pixels=self.spec.max_pixels)
            size = 3 * kept.width * kept.height
            if size <= self._room:
                self._kept[image.source], self._room = kept, self._room - size
        return kept

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}}

    def _owner(self, k: int, row: int, j: int) -> int:
        """The example that vision row `j` of a text row belongs to."""
        examples = self.plan.batch(k)[row]
        ends = np.cumsum(self.pictures[list(examples)])
        return examples[int(np.searchsorted(ends, j, side="right"))]


class LateLoader:
    """Batches of a loader that is made when the first is asked for: a finished stage asks for none."""

    def __init__(self, make: Callable[[], Loader]) -> None:
        self.make = make

    def iterate(self, start: int = 0) -> Generator[tuple[int, Batch], None, None]:
        """As `Loader.iterate`."""
        return self.make().iterate(start)


class _Batches:
    """Batches start, start + 1, ... as a grain source; plain dicts, which cross process borders as they are."""

    def __init__(self, loader: Loader, start: int):
        self.loader, self.start = loader, start

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _arrays_of(self.loader.build(self.start + int(index)))

    def __repr__(self) -> str:
        return f"{self.loader!r} from {self.start}"


def _arrays_of(batch: Batch) -> dict[str, np.ndarray]:
    """The arrays that a batch has by name, those of a named sense as ``NAME/field``."""
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.name != "senses"}
    flat = {name: array for name, array in found.items() if array is not None}
    for name, rows in (batch.senses or {}).items():
        flat |= {f"{name}/{field.name}": getattr(rows, field.name) for field in dataclasses.fields(rows)}
    return flat


def _batch_of(arrays: Mapping[str, np.ndarray]) -> Batch:
    """The batch that `_arrays_of` took apart."""
    names = dict.fromkeys(path.split("/")[0] for path in arrays if "/" in path)
    fields = [field.name for field in dataclasses.fields(SenseRows)]
    senses = {name: SenseRows(**{field: arrays[f"{name}/{field}"] for field in fields}) for name in names}
    return Batch(**{path: a for path, a in arrays.items() if "/" not in path}, senses=senses or None)


def _close_at_exit(batches: Generator) -> None:
    """End a stream that nobody closed before the interpreter falls apart, or grain leaves shared memory behind."""
    _OPEN.add(batches)
    atexit.unregister(_close_all)  # registered last means run first, before the modules that grain needs to clean up
    atexit.register(_close_all)


def _close_all() -> None:
    for batches in list(_OPEN):
        with contextlib.suppress(ValueError):  # a thread is inside it
            batches.close()


def _mark_flags_parsed() -> None:
    """Grain 0.2.18 reads absl flags when it starts workers and fails where none were ever parsed (grain#1355)."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
