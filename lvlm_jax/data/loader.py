"""Batches for a training run: batch k is the same arrays on any number of hosts, workers and threads.

Whole batches are the items of the grain data set, each a function of k alone, so how many workers fetch them cannot
change their order, and the only data state that a checkpoint needs is k.
"""

import atexit
import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_jax.data.check import Encode, origin_of
from lvlm_jax.data.lengths import Measured, fingerprint, measure_lengths
from lvlm_jax.data.packing import PackingPlan
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import ImageSpec, load_image, to_rows
from lvlm_jax.processing.pooling import taps
from lvlm_jax.processing.schema import NEWLINE, TAPS, TEXT, Batch, Blend, Clip, Encoded, Image
from lvlm_jax.processing.video import read_rows, spec_of
from lvlm_jax.processing.weighting import weighted

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["LateLoader", "Loader", "Measured", "collate", "fingerprint", "measure_lengths", "picture_key"]

Picture = Callable[[Image, int, int], tuple[np.ndarray, np.ndarray]]
"""(picture, global row, vision rows before it in that row) -> (patches[R, P, C], positions[R, P, 2])."""
Augment = Callable[["PIL.Image.Image", np.random.Generator], "PIL.Image.Image"]
_FOREVER = 1 << 40  # batches; grain wants a length
_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()  # streams of this process that are not closed yet


def collate(
    rows: Sequence[Sequence[Encoded]],
    *,
    length: int,
    groups: int,
    vision_rows: int,
    visual_tokens: int,
    pad_id: int,
    spec: ImageSpec | None = None,
    picture: Picture | None = None,
    share: bool = False,
    blend: bool | None = None,
    frames: bool = False,
) -> Batch:
    """Rows of encoded examples as one `Batch` of numpy arrays.

    Args:
      rows: B rows, each the examples packed in it.
      length, groups, vision_rows, visual_tokens: T, G, N, Q.
      spec: how a picture becomes patches; None for a batch without vision (then P and C are 0).
      picture: decodes one picture; default `read_rows`.
      share: a picture that several examples of a group use (same path or bytes) takes its vision rows once.
      blend: whether the batch says of each position which visual tokens fill it together; None where an example needs
        it. A run of one shape decides it once. frames: it also says which vision rows are frames.

    Raises:
      DataError: a row longer than T, a group that needs more than N vision rows, visual positions that are not whole
        pictures.
    """
    if len(rows) % groups:
        raise ValueError(f"{len(rows)} rows do not divide into {groups} groups; make rows a multiple of groups")
    count, size = (0, 0) if spec is None else (spec.patches, spec.values)
    blend = any(e.blend is not None for row in rows for e in row) if blend is None else blend
    shape = (len(rows), length, TAPS)
    batch = Batch(
        tokens=np.full((len(rows), length), pad_id, np.int32),
        weights=np.zeros((len(rows), length), np.float32),
        positions=np.zeros((len(rows), length), np.int32),
        segments=np.zeros((len(rows), length), np.int32),
        image_index=np.full((len(rows), length), TEXT, np.int32),
        patches=np.zeros((groups, vision_rows, count, size), np.float32),
        patch_positions=np.zeros((groups, vision_rows, count, 2), np.int32),
        patch_segments=np.zeros((groups, vision_rows, count), np.int32),
        frames=np.zeros((groups, vision_rows), np.int32) if frames else None,
        blend_index=np.zeros(shape, np.int32) if blend else None,
        blend_weight=np.zeros(shape, np.float32) if blend else None,
    )
    picture = picture or (lambda image, row, j: read_rows(image, spec))
    slots: dict[Any, list[int]] = {}
    taken = 0
    for row, examples in enumerate(rows):
        group, first = divmod(row, len(rows) // groups)
        if not first:
            slots, taken = {}, 0
        places: list[int] = []
        for image, need in ((image, need) for encoded in examples for image, need in zip(encoded.images, encoded.rows)):
            key = picture_key(image) if share else len(slots)
            if key not in slots:
                if taken + need > vision_rows:
                    raise DataError(
                        f"group {group} needs more than {vision_rows} vision rows (one a picture, tile or frame); "
                        "raise vision_rows or replan"
                    )
                slots[key] = here = list(range(taken, taken + need))
                patches, positions = picture(image, row, len(places))
                _check_rows(image, len(patches), need)
                # A picture that keeps its shape has fewer patches than the row: the rest is padding.
                at = (group, here, slice(patches.shape[1]))
                batch.patches[at], batch.patch_positions[at], batch.patch_segments[at] = patches, positions, 1
                if batch.frames is not None:
                    batch.frames[group, here] = isinstance(image.source, Clip)
                taken += need
            places += slots[key]
        _fill_row(batch, row, examples, places, visual_tokens)
    return batch


def _check_rows(image: Image, found: int, need: int) -> None:
    """A picture has as many vision rows as its positions were made for."""
    if found != need:
        name = image.source if isinstance(image.source, str) else f"<{type(image.source).__name__}>"
        raise DataError(
            f"{name}: the picture takes {found} vision row(s), but its positions were made for {need}: the file has "
            "changed meanwhile, or encode and the loader were given different image specs; measure again (lvlm train "
            "--restart does)"
        )


def _fill_row(batch: Batch, row: int, examples: Sequence[Encoded], places: Sequence[int], visual_tokens: int) -> None:
    """Write one row's examples side by side; `places` are the vision rows of its pictures in reading order."""
    at = seen = 0
    for segment, encoded in enumerate(examples, start=1):
        size, rows = len(encoded.tokens), encoded.vision_rows
        length = batch.tokens.shape[1]
        if at + size > length:
            raise DataError(f"row {row} has {at + size} tokens or more but T is {length}; raise the row length")
        here = np.s_[row, at : at + size]
        batch.tokens[here], batch.weights[here] = encoded.tokens, encoded.weights
        batch.positions[here], batch.segments[here] = np.arange(size), segment
        slots = np.asarray([*places[seen : seen + rows], 0], np.int32)
        newline = batch.patches.shape[1] * visual_tokens
        batch.image_index[here] = _image_index(encoded, slots, visual_tokens, newline)
        if batch.blend_index is not None:
            own = encoded.blend and Blend(_placed(encoded.blend.index, slots, visual_tokens), encoded.blend.weight)
            batch.blend_index[here], batch.blend_weight[here] = taps(batch.image_index[here], own)
        elif encoded.blend is not None:
            raise DataError(f"row {row}: several visual tokens fill a position together, but the batch has blend=False")
        at, seen = at + size, seen + rows


def _image_index(encoded: Encoded, slots: np.ndarray, visual_tokens: int, newline: int) -> np.ndarray:
    """`Encoded.visual` (within the example) as positions in the group's flat visual tokens, then the newline."""
    ends = np.cumsum([0, *encoded.sizes])
    seen, before = encoded.visual[encoded.visual != TEXT], 0
    for first, stop, rows, image in zip(ends[:-1], ends[1:], encoded.rows, encoded.images):
        own = seen[first:stop]
        own = own[own != NEWLINE] - before * visual_tokens
        # Every picture begins with the whole of it, if it is not pooled; its tiles may lack what is padding.
        begins = len(own) >= visual_tokens and (own[:visual_tokens] == np.arange(visual_tokens)).all()
        begins |= encoded.blend is not None or isinstance(image.source, Clip)
        if not begins or (own >= rows * visual_tokens).any() or (rows == 1 and len(own) > visual_tokens):
            raise DataError(
                f"{len(own)} visual positions for a picture of {rows} x {visual_tokens} tokens; encode and the loader "
                "must be given the same visual_tokens"
            )
        before += rows
    if ends[-1] != len(seen):
        raise DataError(f"{len(seen)} visual positions, but the pictures take {ends[-1]}; pictures must stay whole")
    if not visual_tokens:
        return encoded.visual
    own = np.maximum(encoded.visual, 0)
    index = _placed(own, slots, visual_tokens)
    return np.where(encoded.visual == TEXT, TEXT, np.where(encoded.visual == NEWLINE, newline, index))


def _placed(own: np.ndarray, slots: np.ndarray, visual_tokens: int) -> np.ndarray:
    """An example's own visual tokens in the numbers of its group's, `slots` being the vision rows of its pictures."""
    return slots[own // visual_tokens] * visual_tokens + own % visual_tokens


def picture_key(image: Image) -> Any:
    """What makes two pictures the same one: equal paths or bytes, or one object in memory; of a clip its frames too."""
    if isinstance(image.source, Clip):
        return picture_key(Image(image.source.video.source)), image.source.indices
    key = image.source if isinstance(image.source, str | bytes) else id(image.source)
    return (key, image.whole) if image.whole else key


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
      augment: (PIL picture, rng) -> PIL picture; the generator is seeded by (plan seed, k, row, picture).
      blend, frames: as `collate` takes them.
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
        frames: bool = False,
    ):
        if len(plan.lengths) != len(source):
            raise ValueError(f"{len(plan.lengths)} lengths in the plan but {len(source)} records; measure again")
        if plan.groups % hosts:
            raise ValueError(f"{plan.groups} groups do not divide among {hosts} hosts; make groups a multiple")
        if not 0 <= host < hosts:
            raise ValueError(f"host {host} of {hosts}: hosts are numbered from 0")
        self.source, self.encode, self.spec, self.plan = source, encode, spec, plan
        self.visual_tokens, self.pad_id, self.augment, self.weigh_by = visual_tokens, pad_id, augment, weigh_by
        self.blend, self.frames = blend, frames
        self.host, self.hosts, self.workers, self.threads = host, hosts, workers, threads
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
            vision_rows=self.plan.vision_rows,
            visual_tokens=self.visual_tokens,
            pad_id=self.pad_id,
            spec=self.spec,
            picture=lambda image, row, j: self._picture(image, k, first + row, j),
            blend=self.blend,
            frames=self.frames,
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
        return Batch(**{name: np.array(a) for name, a in arrays.items()} if self.workers else arrays)

    def _encode(self, index: int) -> Encoded:
        try:
            encoded = self.encode(self.source[index])
        except Exception as error:
            raise self._with_origin(error, index) from error
        planned = int(self.plan.lengths[index]), int(self.plan.pictures[index])
        if planned != (len(encoded.tokens), encoded.vision_rows):
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
        ends = np.cumsum(self.plan.pictures[list(examples)])
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
        batch = self.loader.build(self.start + int(index))
        found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return {name: array for name, array in found.items() if array is not None}

    def __repr__(self) -> str:
        return f"{self.loader!r} from {self.start}"


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
