"""Which frames of a video a model sees, and what it is told of their times: functions of numbers, nothing is decoded.

A clip of N frames is N equal slots of time, so that a rule that counts frames means the same in a clip whose frames
come at uneven times; where they come evenly slot i is frame i.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_jax.processing.pooling import POOLS, end_rows, pooled_side
from lvlm_jax.processing.schema import TAPS, Blend
from lvlm_jax.processing.tiles import Span


def uniform(total: int, count: int) -> list[int]:
    """The first frame, the last, and evenly between, rounded down; all of a clip that has no more than `count`.

    Source: LLaVA-NeXT-Video, Video-LLaVA and LLaVA-OneVision, which all write ``linspace(0, N - 1, n, dtype=int)``.
    """
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()


def videochat(total: int, count: int) -> list[int]:
    """Steps of (N - 1) / n from half a step on; a clip of fewer than `count` frames repeats some.

    Source: VideoChat, conversation.py, `get_index`.
    """
    step = (total - 1) / count
    return [int(step / 2) + int(np.round(step * i)) for i in range(count)]


def by_rate(total: int, rate: float, fps: float, least: int, most: int, multiple: int = 1) -> list[int]:
    """`fps` frames of each second, from `least` to `most` of them and a multiple of `multiple`, evenly over the clip.

    Args:
      rate: frames a second of the clip itself.
      multiple: frames that the model reads as one (Qwen2-VL: 2).

    Raises:
      ValueError: a clip of fewer than `multiple` frames.

    Source: Qwen2-VL, qwen-vl-utils, `smart_nframes` and the readers beside it.
    """
    low = math.ceil(least / multiple) * multiple
    high = math.floor(min(most, total) / multiple) * multiple
    count = math.floor(min(max(total / rate * fps, low), high, total) / multiple) * multiple
    if count < max(multiple, 1):
        raise ValueError(f"the clip has {total} frame(s), but the model reads {multiple} at a time; use a longer clip")
    # The authors' linspace is torch's, in float32 and from both ends, which decides where a half is rounded to.
    step = np.float32(total - 1) / np.float32(max(count - 1, 1))
    places = np.arange(count, dtype=np.float32)
    up, down = step * places, np.float32(total - 1) - step * places[::-1]
    return np.round(np.where(places < count // 2, up, down) if count > 1 else up).astype(int).tolist()


def head(total: int, rate: float, fps: float, count: int) -> list[int]:
    """The first `count` of the frames that stand 1 / `fps` seconds apart (every frame of a slower clip)."""
    step = max(rate / fps, 1.0)
    return [i for i in (round(step * k) for k in range(count)) if i < total]


def tail(total: int, rate: float, fps: float, count: int) -> list[int]:
    """As `head`, counted back from the last frame."""
    return [total - 1 - i for i in reversed(head(total, rate, fps, count))]


def every(total: int, rate: float, fps: float, count: int) -> list[int]:
    """Every so many-th frame from the first on, about `fps` of each second; evenly where those are more than `count`.

    Source: LLaVA-OneVision and LLaVA-Video in training, llava/utils.py, `process_video_with_decord`.
    """
    found = list(range(0, total, max(round(rate / fps), 1)))
    return found if len(found) <= count else uniform(total, count)


SAMPLERS: dict[str, Callable[["VideoSpec", int, float], list[int]]] = {
    "uniform": lambda spec, total, rate: uniform(total, spec.frames),
    "videochat": lambda spec, total, rate: videochat(total, spec.frames),
    "fps": lambda spec, total, rate: by_rate(total, rate, spec.fps, spec.least, spec.frames, spec.multiple),
    "head": lambda spec, total, rate: head(total, rate, spec.fps, spec.frames),
    "tail": lambda spec, total, rate: tail(total, rate, spec.fps, spec.frames),
    "every": lambda spec, total, rate: every(total, rate, spec.fps, spec.frames),
}
"""Name -> (spec, frames of the clip, frames a second of it) -> the chosen ones in order."""


def _videochat_sentence(times: Sequence[float], duration: float) -> str:
    return f"The video contains {len(times)} frames sampled at {', '.join(str(round(t, 1)) for t in times)} seconds."


def _llava_video_sentence(times: Sequence[float], duration: float) -> str:
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly sampled from it. These "
        f"frames are located at {','.join(f'{t:.2f}s' for t in times)}.Please answer the following questions related "
        "to this video."
    )


SENTENCES: dict[str, Callable[[Sequence[float], float], str]] = {
    "none": lambda times, duration: "",
    "videochat": _videochat_sentence,
    "llava_video": _llava_video_sentence,
}
"""Name -> (times of the frames, the clip's duration, in seconds) -> what the model is told after the frames.

Source: VideoChat, conversation.py; LLaVA-Video, train.py (the missing space is theirs).
"""

NEWLINES = ("none", "row", "frame", "video")
"""What the learned newline ends: nothing, each row of a frame's tokens, each frame, or the whole video."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSpec:
    """How a video becomes frames, which are pictures from there on.

    sampler: a key of `SAMPLERS`. frames: the most of one video, the budget of its tokens. fps: frames a second, for the
    samplers "fps", "head", "tail" and "every"; least, multiple: for "fps" (see `by_rate`). newline: a word of
    `NEWLINES`, for models that learn one. sentence: a key of `SENTENCES`. pool: a key of `pooling.POOLS`, how the
    square of a frame's visual tokens is made smaller. fit: how a frame becomes a square, a word of `ImageSpec.fit`;
    None as pictures do.
    """

    sampler: str = "uniform"
    frames: int = 8
    fps: float = 2.0
    least: int = 4
    multiple: int = 1
    newline: str = "none"
    sentence: str = "none"
    pool: str = "none"
    fit: str | None = None

    def __post_init__(self) -> None:
        known = {"sampler": SAMPLERS, "newline": NEWLINES, "sentence": SENTENCES, "pool": POOLS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("frames", "least", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps {self.fps}: frames a second, above 0")
        if self.sampler != "fps" and self.multiple != 1:
            raise ValueError(f"multiple {self.multiple} with sampler {self.sampler!r}: only 'fps' reads it")
        if self.sampler == "fps" and not self.multiple <= self.frames >= self.least:
            raise ValueError(
                f"frames {self.frames} is the most of a video, but least is {self.least} and multiple {self.multiple}; "
                "raise frames, or lower least"
            )

    def indices(self, total: int, rate: float) -> list[int]:
        """The frames taken of `total`, of which the clip shows `rate` a second; never more than `frames`.

        Raises:
          ValueError: a clip that is too short for the sampler.
        """
        return SAMPLERS[self.sampler](self, total, rate)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "VideoSpec | None":
        """From the content of a video_preprocessor_config.json that `to_hf` wrote; None for another's.

        Raises:
          ValueError: a value that is not known, by name.
        """
        if config.get("video_processor_type") != _PROCESSOR:
            return None
        return cls(**{ours: config[theirs] for ours, theirs in _FIELDS.items() if theirs in config})

    def to_hf(self) -> dict[str, Any]:
        """The content of video_preprocessor_config.json; `from_hf` reads it back."""
        return {"video_processor_type": _PROCESSOR, **{theirs: getattr(self, ours) for ours, theirs in _FIELDS.items()}}

    def span(self, frames: int, visual_tokens: int) -> Span:
        """The positions of a video of which so many frames are taken, `visual_tokens` each before they are pooled.

        Raises:
          ValueError: newline "row", or a pool, where a frame's tokens are no square grid, or one too small for it.
        """
        side = math.isqrt(visual_tokens)
        if side * side != visual_tokens and (self.newline == "row" or self.pool != "none"):
            what = "newline 'row'" if self.pool == "none" else f"pool {self.pool!r}"
            raise ValueError(f"{what} with {visual_tokens} visual tokens of a frame, which are no square grid")
        own, blend, each = np.arange(frames * visual_tokens, dtype=np.int32), None, visual_tokens
        if self.pool != "none" and visual_tokens:
            if not pooled_side(side, self.pool):
                raise ValueError(f"pool {self.pool!r} leaves nothing of {visual_tokens} visual tokens of a frame")
            one = POOLS[self.pool](own[:visual_tokens].reshape(side, side))
            index = one.index + visual_tokens * np.arange(frames, dtype=np.int32)[:, None, None]
            index = index.reshape(-1, TAPS)
            blend = None if self.pool == "corner" else Blend(index, np.tile(one.weight, (frames, 1)))
            side, each, own = pooled_side(side, self.pool), len(one.index), index[:, 0]
        size = {"none": 0, "row": side, "frame": each, "video": len(own)}[self.newline]
        if size:
            own, blend = end_rows(own.reshape(-1, size), blend)
        return Span(frames, own, blend)


_PROCESSOR = "lvlm_jax"
_FIELDS = {
    "sampler": "sampler",
    "frames": "max_frames",
    "fps": "fps",
    "least": "min_frames",
    "multiple": "temporal_patch_size",
    "newline": "newline",
    "sentence": "sentence",
    "pool": "pool",
    "fit": "fit",
}
"""Our name of a field -> the torch library's, where it has one."""

DEFAULT = VideoSpec()
"""Where nobody says otherwise."""
