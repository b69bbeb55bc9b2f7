"""What there is to know of a video before any of it is decoded: opening one safely, and what its header says.

Whatever is wrong with a file is said in one `VideoError` that names the file, the fault and the fix. A file that ends
too early is a shorter clip, which is said once.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_jax.processing.picture import MAX_PIXELS, REMOTE, ImageError, no_such_file, read_data_url, read_remote
from lvlm_jax.processing.schema import Video

if TYPE_CHECKING:
    import av

_THREADS = 2  # of one decoder: batches are built by several threads already


class VideoError(ImageError):
    """A video that cannot be used: the message names the file, what is wrong, and the fix."""


@dataclasses.dataclass(frozen=True)
class Info:
    """What a header says of a clip: the frames that are there, how many a second, and their pixels."""

    frames: int
    rate: float
    width: int
    height: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.rate


def probe(video: Video, max_pixels: int = MAX_PIXELS) -> Info:
    """What there is to know of a clip without decoding it; a file is looked at once for as long as it is unchanged.

    Containers that do not say how many frames they hold (Matroska, WebM, MPEG-TS) are read once to count them.
    Raises VideoError: no such file, no video in it, not one frame, frames of more than `max_pixels`, an array without
    its frames a second.
    """
    source = video.source
    if isinstance(source, np.ndarray):
        info = _array_info(video)
    elif isinstance(source, str | os.PathLike) and not (str(source).startswith("data:") or "://" in str(source)):
        path = os.fspath(source)
        try:
            stat = os.stat(path)
        except (OSError, ValueError) as error:
            there = not isinstance(error, FileNotFoundError)
            words = f"{path}: the file cannot be read ({error})" if there else no_such_file(path, video.under)
            raise VideoError(words) from None
        info = _probe_file(path, stat.st_mtime_ns, stat.st_size)
    else:
        info = _probe(video)
    if info.width * info.height > max_pixels:
        raise VideoError(
            f"{name_of(video)}: the video claims {info.width} x {info.height} pixels, more than the limit of "
            f"{max_pixels / 1e6:.1f} megapixels a frame; shrink it or raise max_pixels"
        )
    return info


def name_of(video: Video) -> str:
    """What messages call it."""
    source = video.source
    if isinstance(source, str) and source.startswith("data:"):
        return "<data URL>"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "<array>" if isinstance(source, np.ndarray) else f"<{type(source).__name__}>"


@contextlib.contextmanager
def opened(video: Video) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """The container and its moving picture. Nothing but the source itself is read: no playlist, no address."""
    try:
        import av
        from av.stream import Disposition
    except ImportError:
        raise VideoError(f"{name_of(video)}: reading videos needs PyAV; pip install 'lvlm-jax[video]'") from None

    with contextlib.ExitStack() as files:
        source = _source(video)
        try:
            options = {"format_whitelist": ",".join(CONTAINERS)}
            container = files.enter_context(av.open(source, container_options=options))
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VideoError(
                f"{name_of(video)}: is not a video that is read here ({', '.join(CONTAINERS)}), or its beginning or "
                f"its index is damaged or missing, as where a download broke off ({reason}); fetch or export it again"
            ) from None
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            has = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise VideoError(f"{name_of(video)}: has {has} but no video; name the file that holds the moving pictures")
        streams[0].codec_context.thread_count = _THREADS
        yield container, streams[0]


CONTAINERS = ("mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif")
"""What is read; a playlist would open other files and addresses."""


def _source(video: Video) -> Any:
    """What PyAV opens."""
    source = video.source
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith("data:"):
        return io.BytesIO(read_data_url(source))
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if path.startswith(REMOTE):
            return io.BytesIO(read_remote(path, video.under))
        if "://" in path:
            raise VideoError(f"{path}: is an address, and nothing is fetched here; download it and give the path")
        return f"file:{path}"
    raise VideoError(f"{name_of(video)}: not a video; give a path, bytes or a uint8 array of [N, H, W, 3]")


@functools.lru_cache(maxsize=1 << 16)
def _probe_file(path: str, changed: int, size: int) -> Info:
    return _probe(Video(path))


def _probe(video: Video) -> Info:
    with opened(video) as (container, stream):
        frames, rate = _from_index(video, container, stream) if stream.frames else _counted(video, container, stream)
        if not frames:
            raise VideoError(f"{name_of(video)}: the video holds not one frame; export or fetch it again")
        return Info(frames=frames, rate=rate, width=stream.width, height=stream.height)


def _from_index(video: Video, container: "av.container.InputContainer", stream: "av.VideoStream") -> tuple[int, float]:
    """(frames, frames a second) by the container's index; frames beyond the end of the file are not there."""
    entries = [entry for entry in stream.index_entries if not entry.is_discard]
    total, size = len(entries) or stream.frames, container.size
    there = sum(entry.pos + entry.size <= size for entry in entries) if entries and size > 0 else total
    rate = _rate(stream, total, float((stream.duration or 0) * stream.time_base))
    if there < total:
        _say_cut(video, there / rate, total / rate)
    return there, rate


def _counted(video: Video, container: "av.container.InputContainer", stream: "av.VideoStream") -> tuple[int, float]:
    """The same by reading the file once, where its header does not say."""
    from av.error import FFmpegError

    stamps, broken = [], ""
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts if packet.pts is not None else packet.dts)
    except FFmpegError as error:
        broken = error.strerror
    if not stamps or None in stamps:
        return len(stamps), _rate(stream, len(stamps), 0.0)
    spread = float((max(stamps) - min(stamps)) * stream.time_base)
    rate = _rate(stream, len(stamps), spread * len(stamps) / max(len(stamps) - 1, 1))
    said = _seconds(stream.metadata.get("DURATION", ""))
    if broken or (said and said - len(stamps) / rate > 1.0):
        _say_cut(video, len(stamps) / rate, said)
    return len(stamps), rate


def _rate(stream: "av.VideoStream", frames: int, seconds: float) -> float:
    """Frames a second: the header's where it agrees with what is there, as frames that come evenly do."""
    said = float(stream.average_rate or 0)
    if seconds <= 0:
        return said or 1.0
    return said if said and abs(said * seconds - frames) < 0.5 else frames / seconds


def _seconds(text: str) -> float:
    """``00:01:02.5`` in seconds; 0 for what is none."""
    try:
        hours, minutes, seconds = map(float, text.split(":"))
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds


def _say_cut(video: Video, good: float, said: float) -> None:
    whole = f" of {said:.2f} s" if said else ""
    warnings.warn(f"{name_of(video)}: the file ends early: its first {good:.2f} s{whole} are used", stacklevel=2)


def _array_info(video: Video) -> Info:
    """Frames that are in memory."""
    array = video.source
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise VideoError(f"<array>: {array.dtype}{list(array.shape)} is no clip; give uint8[N, H, W, 3]")
    if not len(array):
        raise VideoError("<array>: the video holds not one frame")
    if not video.fps or not 0 < video.fps < math.inf:
        raise VideoError(f"<array>: fps={video.fps}: give the frames a second of the array, Video(array, fps=25)")
    return Info(frames=len(array), rate=float(video.fps), width=array.shape[2], height=array.shape[1])
