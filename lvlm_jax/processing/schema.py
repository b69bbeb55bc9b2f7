"""What a model eats: conversations on the host (`Example`), arrays on the device (`Batch`).

A prompt is a list of segments, never a string that is searched for a placeholder: whoever types ``<image>`` or ``</s>``
gets those characters.
"""

import dataclasses
import itertools
from typing import Any, Literal

import numpy as np

from lvlm_jax.shapes import Array, Float, Int, pytree

Role = Literal["system", "user", "assistant"]

TEXT, NEWLINE = -1, -2
"""What `Encoded.visual` says of a position that no visual token fills: text, or the learned end of a picture's row."""

TAPS = 4
"""The most visual tokens that fill one position together."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of plain text, tokenized as the characters it is."""

    text: str


@dataclasses.dataclass(frozen=True)
class Image:
    """A picture: a path, encoded bytes, a PIL image, uint8[H, W, 3], or a `Clip`, a picture of several frames.

    under: of a path that a record names, the folder that such paths start from; for messages. whole: in one vision row,
    also where pictures are cut into tiles (`encode` decides it).
    """

    source: Any
    under: str = dataclasses.field(default="", compare=False, repr=False)
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Video:
    """A clip: a path, encoded bytes, or its frames uint8[N, H, W, 3], of which `fps` are shown a second.

    under: as for `Image`.
    """

    source: Any
    under: str = dataclasses.field(default="", compare=False, repr=False)
    fps: float | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames that are taken of a video: the source of the `Image` that stands for it once they are chosen.

    indices: slots of the video, `rate` of them a second, in order; times: when each begins, and duration, that of the
    whole video, in seconds. fit: how a frame becomes a square, a word of `ImageSpec.fit`; None as pictures do.
    """

    video: Video
    indices: tuple[int, ...]
    times: tuple[float, ...]
    rate: float
    duration: float
    fit: str | None = None


Segment = Text | Image | Video


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one speaker says: text, pictures and videos in order."""

    role: Role
    segments: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation. `origin` says where it came from (``train.json:12``) and stands in every error about it.

    `template` names the way to write it down where that is not the run's: documents among conversations.
    """

    turns: tuple[Turn, ...]
    id: str = ""
    origin: str = ""
    template: str = ""

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures in reading order."""
        return tuple(s for turn in self.turns for s in turn.segments if isinstance(s, Image))

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos in reading order."""
        return tuple(s for turn in self.turns for s in turn.segments if isinstance(s, Video))


@dataclasses.dataclass(frozen=True)
class Blend:
    """Positions that several visual tokens fill together: what a resized or pooled grid of them comes to.

    index int32[n, 4]: visual tokens; weight float32[n, 4]: how much each counts, all 0 where no more than one fills
    the position.
    """

    index: np.ndarray
    weight: np.ndarray

    def __getitem__(self, part: slice) -> "Blend":
        return Blend(self.index[part], self.weight[part])


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An `Example` as ids: what the packer packs.

    tokens int32[n]; weights float32[n], the loss weight of each token as a target; visual int32[n], which of the
    example's own visual tokens fills this position (vision row r holds r*Q ... r*Q+Q-1), `TEXT` or `NEWLINE`.
    images: the pictures in reading order, a video (its `Clip`) counting as one; rows: vision rows of each (default
    one; a tile or a frame is one), sizes: positions of each (default equal shares). A picture's vision rows follow one
    another, and so do its positions. blend: the positions that several visual tokens fill, in the same numbers, of
    which `visual` holds one there; None where there are none.
    """

    tokens: np.ndarray
    weights: np.ndarray
    visual: np.ndarray
    images: tuple[Image, ...] = ()
    rows: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    blend: Blend | None = None

    def __post_init__(self) -> None:
        count = len(self.images)
        if not self.rows:
            object.__setattr__(self, "rows", (1,) * count)
        if not self.sizes:
            taken = int((self.visual != TEXT).sum())
            object.__setattr__(self, "sizes", (taken // max(count, 1),) * count)

    @property
    def vision_rows(self) -> int:
        """Vision rows of all pictures."""
        return sum(self.rows)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first position, one past the last) of each picture; (0, 0) for one that takes none."""
        places = np.flatnonzero(self.visual != TEXT)
        ends = np.cumsum([0, *self.sizes])
        return [(int(places[a]), int(places[b - 1]) + 1) if b > a else (0, 0) for a, b in itertools.pairwise(ends)]


@pytree
@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's input. Rows come in G groups of B/G; a group's pictures live on the group's data shard.

    A visual token fills a position, or where text looks at pictures from between the layers (`fusion.cross_attention`)
    Q is 1: a position is where a picture stands, its embedding stays text, and `image_index` names the vision row.

    | field           | shape            | meaning                                                                |
    | --------------- | ---------------- | ---------------------------------------------------------------------- |
    | tokens          | int32[B, T]      | token ids; any valid id where a picture fills the position             |
    | weights         | float32[B, T]    | loss weight of this token as a target, predicted from the one before   |
    | positions       | int32[B, T]      | position within the example (RoPE), restarting at 0                    |
    | segments        | int32[B, T]      | 0 padding; 1, 2, ... the examples packed in this row                   |
    | image_index     | int32[B, T]      | the visual token of the group that fills it, -1 text (N*Q: newline)    |
    | patches         | float32[G,N,P,C] | normalised pixels of each patch in (row, column, channel) order        |
    | patch_positions | int32[G,N,P,2]   | (row, column) of each patch in its picture                             |
    | patch_segments  | int32[G,N,P]     | 0 padding; 1, 2, ... the pictures that share a vision row              |
    | frames          | int32[G,N]       | None, or 1 for a frame, whose features are averaged (`pools_frames`)   |
    | blend_index     | int32[B, T, 4]   | None, or the visual tokens whose weighted sum fills a position         |
    | blend_weight    | float32[B, T, 4] | None, or their weights; where one fills it alone 1, 0, 0, 0            |

    Where `blend_index` is given it says what fills a position, and `image_index` which positions are filled at all.
    """

    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    weights: Float[Array, "B T"] | Float[np.ndarray, "B T"]
    positions: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    segments: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    image_index: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    patches: Float[Array, "G N P C"] | Float[np.ndarray, "G N P C"]
    patch_positions: Int[Array, "G N P 2"] | Int[np.ndarray, "G N P 2"]
    patch_segments: Int[Array, "G N P"] | Int[np.ndarray, "G N P"]
    frames: Int[Array, "G N"] | Int[np.ndarray, "G N"] | None = None
    blend_index: Int[Array, "B T 4"] | Int[np.ndarray, "B T 4"] | None = None
    blend_weight: Float[Array, "B T 4"] | Float[np.ndarray, "B T 4"] | None = None

    def replace(self, **changes: Any) -> "Batch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
