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
    also where pictures are cut into tiles (`encode` decides it). sense: which of a model's named senses sees it; "" is
    the model's own eye.
    """

    source: Any
    under: str = dataclasses.field(default="", compare=False, repr=False)
    whole: bool = False
    sense: str = ""


@dataclasses.dataclass(frozen=True)
class Video:
    """A clip: a path, encoded bytes, or its frames uint8[N, H, W, 3], of which `fps` are shown a second.

    under, sense: as for `Image`.
    """

    source: Any
    under: str = dataclasses.field(default="", compare=False, repr=False)
    fps: float | None = None
    sense: str = ""


@dataclasses.dataclass(frozen=True)
class Features:
    """Features computed elsewhere, float[n, C]: an array, or the path of a .npy or .npz file.

    sense: which of a model's named senses reads them. key: which array of an .npz file; one that holds a single array
    needs none. under: as for `Image`.
    """

    source: Any
    sense: str
    key: str = ""
    under: str = dataclasses.field(default="", compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames that are taken of a video: the source of the `Image` that stands for it once they are chosen.

    indices: slots of the video, `rate` of them a second, in order; times: when each begins, and duration, that of the
    whole video, in seconds. total: frames that are taken of the whole video, where these are a part of them.
    """

    video: Video
    indices: tuple[int, ...]
    times: tuple[float, ...]
    rate: float
    duration: float
    total: int = 0


Segment = Text | Image | Video | Features
Shown = Image | Features
"""What a template leaves among the pieces of text: videos have become the `Image` of a `Clip` by then."""


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
class Placed:
    """A segment of a named sense in an encoded text.

    start, size: the positions that it fills, in the order of the sense's tokens; rows: vision rows that it takes.
    """

    segment: Image | Features
    start: int
    size: int
    rows: int = 1

    @property
    def sense(self) -> str:
        """The name of its sense."""
        return self.segment.sense

    @property
    def stop(self) -> int:
        """One past its last position."""
        return self.start + self.size


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An `Example` as ids: what the packer packs.

    tokens int32[n]; weights float32[n], the loss weight of each token as a target; visual int32[n], which of the
    example's own visual tokens fills this position (vision row r holds r*Q ... r*Q+Q-1), `TEXT` or `NEWLINE`.
    images: the pictures in reading order, a video (its `Clip`) counting as one; rows: vision rows of each (default
    one; a tile or a frame is one), sizes: positions of each (default equal shares). A picture's vision rows follow one
    another, and so do its positions. blend: the positions that several visual tokens fill, in the same numbers, of
    which `visual` holds one there; None where there are none. instructions: int32[s] of each picture, the text that the
    connector reads beside it, for one that reads any (`processing.instruction`). placed: what named senses read;
    `visual` says `TEXT` there.

    Of pictures that share vision rows (`processing.native`): places, of each picture where each of its parts stands
    (vision row, first patch, patches), `rows` being how many it is the first in; and axes int32[n, 3], the position of
    each token by time, row and column.
    """

    tokens: np.ndarray
    weights: np.ndarray
    visual: np.ndarray
    images: tuple[Image, ...] = ()
    rows: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    blend: Blend | None = None
    places: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    axes: np.ndarray | None = None
    instructions: tuple[np.ndarray, ...] = ()
    placed: tuple[Placed, ...] = ()

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
    def sense_rows(self) -> dict[str, int]:
        """Vision rows of each named sense that has some."""
        names = dict.fromkeys(one.sense for one in self.placed)
        return {name: sum(one.rows for one in self.placed if one.sense == name) for name in names}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first position, one past the last) of each picture; (0, 0) for one that takes none."""
        places = np.flatnonzero(self.visual != TEXT)
        ends = np.cumsum([0, *self.sizes])
        return [(int(places[a]), int(places[b - 1]) + 1) if b > a else (0, 0) for a, b in itertools.pairwise(ends)]


@pytree
@dataclasses.dataclass(frozen=True)
class SenseRows:
    """What one named sense of a `Batch` is fed, and where its tokens go.

    | field           | shape            | meaning                                                                |
    | --------------- | ---------------- | ---------------------------------------------------------------------- |
    | index           | int32[B, T]      | the sense's token of the group that fills the position, -1 for none    |
    | patches         | float32[G,N,P,C] | patches of pictures, or the vectors of a sequence of features          |
    | patch_positions | int32[G,N,P,2]   | (row, column) of a patch; (0, place) of a feature                      |
    | patch_segments  | int32[G,N,P]     | 0 padding; 1, 2, ... the pictures that share a row                     |
    """

    index: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    patches: Float[Array, "G N P C"] | Float[np.ndarray, "G N P C"]
    patch_positions: Int[Array, "G N P 2"] | Int[np.ndarray, "G N P 2"]
    patch_segments: Int[Array, "G N P"] | Int[np.ndarray, "G N P"]


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
    | blend_index     | int32[B, T, 4]   | None, or the visual tokens whose weighted sum fills a position         |
    | blend_weight    | float32[B, T, 4] | None, or their weights; where one fills it alone 1, 0, 0, 0            |
    | axes            | int32[B, T, 3]   | position by time, row and column, where the decoder counts so (M-RoPE) |
    | instruction     | int32[G,N,S]     | ids that the connector reads beside a vision row, -1 padding; or None  |
    | senses          | name: SenseRows  | of a model with named senses: what each is fed; None for none          |

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
    blend_index: Int[Array, "B T 4"] | Int[np.ndarray, "B T 4"] | None = None
    blend_weight: Float[Array, "B T 4"] | Float[np.ndarray, "B T 4"] | None = None
    axes: Int[Array, "B T 3"] | Int[np.ndarray, "B T 3"] | None = None
    instruction: Int[Array, "G N S"] | Int[np.ndarray, "G N S"] | None = None
    senses: dict[str, SenseRows] | None = None

    def replace(self, **changes: Any) -> "Batch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
