"""Which frames stand for a video, and reading them one after another.

Frames are decoded in a row and only the chosen ones become pictures, so that an hour takes no more memory than a
second. Bytes that are damaged where a frame is wanted are a `VideoError`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from lvlm_jax.processing.container import VideoError, name_of, opened, probe
from lvlm_jax.processing.frames import SENTENCES, VideoSpec
from lvlm_jax.processing.image import ImageSpec, to_rows
from lvlm_jax.processing.picture import MAX_PIXELS, load_image
from lvlm_jax.processing.schema import Clip, Example, Image, Segment, Text, Video

if TYPE_CHECKING:
    import av

_PATIENCE = 1.0  # seconds of video that are decoded before a jump is tried
_GAP = 8  # half slots that a frame of a damaged file may be early: a cut takes frames out of the last few
_IN_ORDER = ("avi", "mpeg")  # containers in which times after a jump are guesses
_EVEN = ("avi",)  # those that store no times: their frames come evenly


def choose(video: Video, spec: VideoSpec, max_pixels: int = MAX_PIXELS) -> Clip:
    """The frames of a video by `spec`: none is decoded, so that texts are measured cheaply. Raises VideoError."""
    info = probe(video, max_pixels)
    try:
        indices = spec.indices(info.frames, info.rate)
    except ValueError as error:
        raise VideoError(f"{name_of(video)}: {error}") from None
    times = tuple(index / info.rate for index in indices)
    return Clip(video, tuple(indices), times, info.rate, info.duration, spec.fit)


def chosen(example: Example, spec: VideoSpec, max_pixels: int = MAX_PIXELS) -> Example:
    """The conversation with each video as the `Image` of its `Clip` and, where `spec` has one, the sentence on it."""
    if not example.videos:
        return example
    turns = []
    for turn in example.turns:
        segments: list[Segment] = []
        for number, segment in enumerate(turn.segments):
            if not isinstance(segment, Video):
                segments.append(segment)
                continue
            clip = choose(segment, spec, max_pixels)
            segments.append(Image(clip))
            if sentence := SENTENCES[spec.sentence](clip.times, clip.duration):
                goes_on = number + 1 < len(turn.segments) and isinstance(turn.segments[number + 1], Text)
                segments.append(Text(sentence + "\n" * goes_on))
        turns.append(dataclasses.replace(turn, segments=tuple(segments)))
    return dataclasses.replace(example, turns=tuple(turns))


def held(example: Example) -> Example:
    """The conversation with the frames of each clip in memory, for files that may change or go away."""

    def hold(segment: Segment) -> Segment:
        clip = segment.source if isinstance(segment, Image) else None
        if not isinstance(clip, Clip):
            return segment
        shown = Video(np.stack([np.asarray(frame) for frame in frames(clip)]), fps=clip.rate)
        return Image(dataclasses.replace(clip, video=shown, indices=tuple(range(len(clip.indices)))))

    turns = tuple(dataclasses.replace(t, segments=tuple(map(hold, t.segments))) for t in example.turns)
    return dataclasses.replace(example, turns=turns)


def pictures(image: Image, max_pixels: int = MAX_PIXELS) -> Iterator[PIL.Image.Image]:
    """The picture, or the frames of a clip one after another, upright 8-bit RGB.

    Raises ImageError as `load_image` does, and VideoError for damage where a frame is wanted.
    """
    return frames(image.source) if isinstance(image.source, Clip) else iter([load_image(image, max_pixels=max_pixels)])


def spec_of(image: Image, spec: ImageSpec) -> ImageSpec:
    """How this picture is read by a `spec` that may cut tiles: frames of a clip have none, nor has one shown whole."""
    if isinstance(image.source, Clip):
        return dataclasses.replace(spec, tiles=None, fit=image.source.fit or spec.fit)
    return dataclasses.replace(spec, tiles=None, fit="pad") if image.whole else spec


def read_rows(
    image: Image, spec: ImageSpec, change: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(patches[N, P, C], positions[N, P, 2]) of a picture and its tiles, or of a clip's frames (`spec_of`).

    change: what is done to each picture first.
    """
    spec = spec_of(image, spec)
    found = pictures(image, spec.max_pixels)
    patches, positions = zip(*(to_rows(picture, spec) for picture in (map(change, found) if change else found)))
    return np.concatenate(patches), np.concatenate(positions)


def frames(clip: Clip) -> Iterator[PIL.Image.Image]:
    """The chosen frames in order, each upright 8-bit RGB: of slot i the one that is shown in the middle of it."""
    if isinstance(clip.video.source, np.ndarray):
        yield from (load_image(clip.video.source[index]) for index in clip.indices)
        return
    reader = _Reader(clip.video)
    picture, last = None, None
    with contextlib.closing(reader):
        for index in clip.indices:
            frame = reader.at(index / clip.rate, (index + 0.5) / clip.rate)
            if frame is not last:
                picture, last = _upright(frame), frame
            yield picture


class _Reader:
    """Frames by time, in rising order: decodes on, or jumps to the key frame before a time that is far away."""

    def __init__(self, video: Video):
        self.video, self.name = video, name_of(video)
        self.files = contextlib.ExitStack()
        self.damage = ""
        self._open()
        self.patience = math.inf if self.container.format.name in _IN_ORDER else _PATIENCE

    def close(self) -> None:
        """Leaves the file."""
        self.files.close()

    def at(self, begin: float, middle: float) -> "av.VideoFrame":
        """The last frame before `middle`; a damaged file must hold one near `begin` (seconds from the clip's start)."""
        if begin - self.here > self.patience:
            self._jump(begin)
        if not self._reach(middle):  # the jump went beyond it, or found no key frame: all of it, in order
            self._open()
            self.patience = math.inf
            self._reach(middle)
        if self.frame is None:
            raise VideoError(f"{self.name}: not one frame can be decoded{self.damage}; export or fetch it again")
        time, frame = self.frame
        if self.damage and begin - time > _GAP * (middle - begin):
            raise VideoError(
                f"{self.name}: damaged: nothing can be decoded after {time:.2f} s, but a frame at {begin:.2f} s is "
                f"wanted{self.damage}; cut the good part out (ffmpeg -i FILE -t {time:.2f} -c copy GOOD), fetch it "
                "again, or leave it out"
            )
        return frame

    def _open(self) -> None:
        """From the beginning."""
        self.files.close()
        self.container, self.stream = self.files.enter_context(opened(self.video))
        self.start = _start(self.stream)
        self.here = 0.0
        self._begin(whole=True)

    def _begin(self, whole: bool) -> None:
        """From where the container stands: nothing is decoded yet."""
        self.whole, self.coming = whole, self._times(whole)
        self.frame: tuple[float, av.VideoFrame] | None = None
        self.next: tuple[float, av.VideoFrame] | None = None

    def _jump(self, begin: float) -> None:
        """To the key frame at or before a time; where that lies behind, there are few, and none is soon looked for."""
        from av.error import FFmpegError

        try:
            self.container.seek(int((begin + self.start) / self.stream.time_base), stream=self.stream)
        except FFmpegError:  # a file that cannot be jumped in
            self.patience = math.inf
            return
        self._begin(whole=False)
        self.next = next(self.coming, None)
        if self.next is not None and self.next[0] <= self.here:
            self.patience = max(self.patience, 2 * (begin - self.next[0]))

    def _reach(self, middle: float) -> bool:
        """Decodes up to the last frame before a time; False if there is none from here on."""
        while True:
            self.next = self.next or next(self.coming, None)
            # The clip's first frame is shown from its beginning, whatever its time says.
            if self.next is None or (self.next[0] >= middle and not (self.whole and self.frame is None)):
                return self.frame is not None
            self.frame, self.next = self.next, None
            self.here = self.frame[0]

    def _times(self, whole: bool) -> Iterator[tuple[float, "av.VideoFrame"]]:
        """(seconds, frame) of each frame that is whole; after a jump from the key frame on, for those before it in time
        lean on what was not read.
        """
        first, even = -math.inf if whole else None, self.container.format.name in _EVEN
        for number, frame in enumerate(self._frames()):
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is None:
                raise VideoError(f"{self.name}: its frames carry no times; ffmpeg -i FILE -c copy FILE.mp4 adds them")
            if frame.is_corrupt:
                self.damage = self.damage or " (a frame is broken)"
                continue
            if first is None and frame.key_frame:
                first = stamp
            if first is not None and stamp >= first:
                time = number / self.stream.average_rate if even else stamp * self.stream.time_base - self.start
                yield float(time), frame

    def _frames(self) -> Iterator["av.VideoFrame"]:
        """What the decoder gives until the file ends or breaks off."""
        from av.error import FFmpegError

        packets = self.container.demux(self.stream)
        while True:
            packet = None  # what a decoder still holds comes after it
            try:
                packet = next(packets)
                yield from self.stream.decode(packet)
            except StopIteration:
                return
            except FFmpegError as error:
                self.damage = self.damage or f" ({error.strerror})"
                if packet is None:
                    yield from self.stream.decode(None)
                    return


def _upright(frame: "av.VideoFrame") -> PIL.Image.Image:
    pixels = frame.to_ndarray(format="rgb24")
    return PIL.Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4)))


def _start(stream: "av.VideoStream") -> Fraction:
    return (stream.start_time or 0) * stream.time_base
