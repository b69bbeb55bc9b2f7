"""A picture as the model's towers want it: normalised patches, by the released processors' own arithmetic.

Pillow and numpy alone, so that the same picture gives the same numbers on a laptop, on Colab and on a pod (the
torchvision processors differ from the Pillow ones by up to 0.03). `picture.py` reads the files.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image

from lvlm_jax.processing import naflex
from lvlm_jax.processing import native as natives
from lvlm_jax.processing.picture import MAX_PIXELS, ImageError, load_image
from lvlm_jax.processing.tiles import Tiles
from lvlm_jax.shapes import Float, Int

__all__ = [
    "FILTERS",
    "MAX_PIXELS",
    "ImageError",
    "ImageSpec",
    "clip_patches",
    "load_image",
    "preprocess",
    "preprocess_rows",
    "to_patches",
    "to_rows",
]

FILTERS = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "box": PIL.Image.Resampling.BOX,
    "hamming": PIL.Image.Resampling.HAMMING,
}
_PROCESSORS = {
    "crop": "CLIPImageProcessor",
    "pad": "LlavaImageProcessor",
    "squash": "SiglipImageProcessor",
    "naflex": "Siglip2ImageProcessor",
    "native": "Qwen2VLImageProcessor",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How a picture becomes `size` x `size` pixels in `patch` x `patch` patches.

    fit: "crop" resizes the shortest side to `shortest` (default `size`) and cuts the centre out (CLIP); "pad" fills up
    to a square with the mean colour, then resizes (LLaVA-1.5); "squash" resizes to the square (SigLIP); "naflex" keeps
    the picture's shape, in at most `max_patches` patches (SigLIP 2; `size` is then the side of the square); "native"
    does so as `native` says, and several pictures share the `max_patches` of a vision row (Qwen2-VL). Pixels are
    (x * rescale - mean) / std. A `size` that is no multiple of `patch` loses the last rows and columns, as a
    convolution with that stride does. `max_pixels` is the most that a file may claim before it is decoded.
    tiles: also cut each picture into tiles of `size` x `size` at a finer resolution (LLaVA-NeXT, LLaVA-OneVision).
    """

    size: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str = "bicubic"
    fit: Literal["crop", "pad", "squash", "naflex", "native"] = "crop"
    rescale: float = 1 / 255
    max_pixels: int = MAX_PIXELS
    shortest: int | None = None
    tiles: Tiles | None = None
    max_patches: int | None = None
    native: natives.Native | None = None

    def __post_init__(self):
        self._check_tiles()
        if (self.fit in ("naflex", "native")) != (self.max_patches is not None):
            raise ValueError(
                f"fit {self.fit!r} with max_patches {self.max_patches}: 'naflex' and 'native' need max_patches, and "
                "nothing else reads it"
            )
        if (self.fit == "native") != (self.native is not None):
            raise ValueError(f"fit {self.fit!r} with native {self.native}: fit='native' needs it, and it alone")
        if not 0 < self.patch <= self.size:
            raise ValueError(f"patch {self.patch} does not fit size {self.size}; the patch is the smaller of the two")
        if self.resample not in FILTERS:
            raise ValueError(f"resample {self.resample!r} is unknown; choose one of {', '.join(FILTERS)}")
        if self.fit not in _PROCESSORS:
            raise ValueError(f"fit {self.fit!r} is unknown; choose one of {', '.join(_PROCESSORS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std are three numbers each, std above 0; got {self.mean} and {self.std}")
        if self.shortest is not None and self.shortest < self.size:
            raise ValueError(f"shortest {self.shortest} is below size {self.size}: the crop would leave the picture")

    def _check_tiles(self) -> None:
        if self.tiles is None:
            return
        if self.fit != "squash":
            raise ValueError(f"fit {self.fit!r} with tiles: the whole picture is squashed there; use fit='squash'")
        for pair in self.tiles.pinpoints:
            if any(side % self.size for side in pair):
                raise ValueError(f"pinpoint {list(pair)} is no multiple of a tile's side, size {self.size}")

    @property
    def patches(self) -> int:
        """Patches of one vision row (P), the most that any has where pictures keep their shape."""
        return (self.size // self.patch) ** 2 if self.max_patches is None else self.max_patches

    @property
    def values(self) -> int:
        """Values of one patch (C), in (row, column, channel) order; of several frames one after the other."""
        return self.patch * self.patch * 3 * (self.native.frames if self.native else 1)

    @classmethod
    def from_hf(cls, config: dict[str, Any], patch: int) -> "ImageSpec":
        """From the content of preprocessor_config.json (CLIP, LLaVA, SigLIP 1 and 2, Idefics 1, Qwen-VL).

        Raises:
          ValueError: what is not known, by name.
        """
        native = natives.from_hf(config, patch)
        most = config.get("max_num_patches")
        if native is not None:
            own, patch, most = native
            config = {**config, "size": patch * math.isqrt(most), "do_center_crop": False, "do_pad": False}
        elif most is not None:
            # What they leave out is their class's default; the square of so many patches stands for a size.
            patch = config.get("patch_size") or patch
            halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
            config = {**halves, **config, "size": patch * math.isqrt(most), "do_center_crop": False, "do_pad": False}
        tiles = Tiles.from_hf(config)
        if not config.get("do_resize", True):
            raise ValueError("preprocessor_config.json: do_resize is false, but every picture must come to one size")
        fit, side, shortest = _shape(config, tiles)
        if tiles is None and most is not None:
            fit = "naflex" if native is None else "native"
        names = {int(value): name for name, value in FILTERS.items()}
        resample = config.get("resample", 3)
        if resample not in names:
            raise ValueError(f"preprocessor_config.json: resample {resample!r} is none of Pillow's {sorted(names)}")
        normalized = config.get("do_normalize", True)
        for key in ("image_mean", "image_std") if normalized else ():
            if key not in config:
                raise ValueError(
                    f"preprocessor_config.json: {key} is missing, so pixels cannot be normalised as trained"
                )
        return cls(
            size=side,
            patch=patch,
            mean=_three(config["image_mean"]) if normalized else (0.0, 0.0, 0.0),
            std=_three(config["image_std"]) if normalized else (1.0, 1.0, 1.0),
            resample=names[resample],
            fit=fit,
            rescale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            shortest=shortest,
            tiles=tiles,
            max_patches=most,
            native=native and own,
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of preprocessor_config.json; `from_hf` reads it back."""
        config: dict[str, Any] = {
            "image_processor_type": _PROCESSORS[self.fit],
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": int(FILTERS[self.resample]),
            "rescale_factor": self.rescale,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        square = {"height": self.size, "width": self.size}
        if self.tiles is not None:
            # LLaVA-NeXT's class crops what it has resized, LLaVA-OneVision's does not.
            crop = {"size": {"shortest_edge": self.size}, "do_center_crop": True, "crop_size": square}
            return {**config, **({"size": square} if self.tiles.several == "whole" else crop), **self.tiles.to_hf()}
        if self.fit == "squash":
            return {**config, "size": square}
        if self.fit == "naflex":
            return {**config, "patch_size": self.patch, "max_num_patches": self.max_patches}
        if self.native is not None:
            return config | natives.to_hf(self.native, self.patch, self.max_patches)
        config |= {"size": {"shortest_edge": self.shortest or self.size}, "do_center_crop": True, "crop_size": square}
        return {**config, "do_pad": True} if self.fit == "pad" else config


def _shape(config: dict[str, Any], tiles: Tiles | None) -> tuple[str, int, int | None]:
    """(fit, size, shortest) that a processor's fields ask for: "crop", "pad", or "squash" where it names neither."""
    size, crop = config.get("size", config.get("image_size", 224)), config.get("crop_size")
    cropped, edge = config.get("do_center_crop", crop is not None), _edge(size, "size")
    padded = bool(config.get("do_pad", False)) and tiles is None
    if not (cropped or padded or (isinstance(size, dict) and "shortest_edge" in size)):
        return "squash", edge, None
    side = _edge(crop, "crop_size") if cropped and crop is not None else edge
    if padded and edge != side:
        raise ValueError(f"preprocessor_config.json: do_pad with size {edge} but crop_size {side}; make them equal")
    if tiles is not None and edge != side:
        raise ValueError(
            f"preprocessor_config.json: image_grid_pinpoints with size {edge} but crop_size {side}; make them equal"
        )
    if padded or tiles is not None:
        return "pad" if padded else "squash", side, None
    return "crop", side, edge if edge != side else None


def _edge(size: Any, key: str) -> int:
    """One side length out of the forms that processors have written over the years."""
    if isinstance(size, dict):
        sides = {size[name] for name in ("shortest_edge", "height", "width") if size.get(name) is not None}
        if len(sides) == 1 and not set(size) - {"shortest_edge", "height", "width"}:
            return int(sides.pop())
    elif isinstance(size, int):
        return size
    raise ValueError(
        f"preprocessor_config.json: {key} {size!r} is not one side of a square; only processors with one fixed size "
        "(CLIP, LLaVA-1.5, SigLIP) or NaFlex (SigLIP 2) are read here"
    )


def _three(values: Any) -> tuple[float, float, float]:
    values = [values] * 3 if isinstance(values, int | float) else list(values)
    if len(values) != 3:
        raise ValueError(f"preprocessor_config.json: image_mean and image_std have three values, got {values}")
    return float(values[0]), float(values[1]), float(values[2])


def preprocess(image: PIL.Image.Image, spec: ImageSpec) -> Float[np.ndarray, "rows cols 3"]:
    """A whole picture at its size by `spec`, normalised; equal to the torch library's Pillow processors bit for bit."""
    return _normalise(_fit(image if image.mode == "RGB" else load_image(image), spec), spec)


def preprocess_rows(image: PIL.Image.Image, spec: ImageSpec) -> Float[np.ndarray, "N rows cols 3"]:
    """A picture's vision rows: the whole of it, and its tiles in reading order where `spec` cuts some."""
    image = image if image.mode == "RGB" else load_image(image)
    return np.stack([_normalise(part, spec) for part in (_fit(image, spec), *_tiles(image, spec))])


def _tiles(image: PIL.Image.Image, spec: ImageSpec) -> list[PIL.Image.Image]:
    """The picture inside the best of the pinpoints, on black, cut into squares."""
    if spec.tiles is None:
        return []
    rows, cols = spec.tiles.resolution(*image.size)
    height, width = spec.tiles.fitted(*image.size)
    canvas = PIL.Image.new("RGB", (cols, rows))
    fitted = image.resize((width, height), FILTERS[spec.resample])
    canvas.paste(fitted, ((cols - width) // 2, (rows - height) // 2))
    side = spec.size
    corners = ((x, y) for y in range(0, rows, side) for x in range(0, cols, side))
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def _normalise(image: PIL.Image.Image, spec: ImageSpec) -> Float[np.ndarray, "rows cols 3"]:
    pixels, table = np.asarray(image), _levels(spec.rescale, spec.mean, spec.std)
    return np.stack([table[c][pixels[..., c]] for c in range(3)], axis=-1)


@functools.lru_cache(maxsize=16)
def _levels(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """One value a channel and level: roundings (float64 product, then float32) of 256 numbers, not of every pixel."""
    levels = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    table = (levels[:, None] - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(table.T)


def to_patches(image: PIL.Image.Image, spec: ImageSpec) -> tuple[Float[np.ndarray, "P C"], Int[np.ndarray, "P 2"]]:
    """(patches, positions): patches row by row with values in (row, column, channel) order; (row, column) of each.

    With fit "naflex" or "native" as many as the picture has, `spec.max_patches` at most.
    """
    patches, positions = to_rows(image, spec) if spec.native else _cut(preprocess(image, spec), spec)
    return (patches[0], positions[0]) if spec.native else (patches, positions)


def to_rows(image: PIL.Image.Image, spec: ImageSpec) -> tuple[Float[np.ndarray, "N P C"], Int[np.ndarray, "N P 2"]]:
    """`to_patches` of each of a picture's vision rows: the whole of it, then its tiles."""
    if spec.native is not None:
        return clip_patches([image], spec)
    patches, positions = zip(*(_cut(pixels, spec) for pixels in preprocess_rows(image, spec)))
    return np.stack(patches), np.stack(positions)


def clip_patches(
    frames: Sequence[PIL.Image.Image], spec: ImageSpec, moving: int = 0
) -> tuple[Float[np.ndarray, "N P C"], Int[np.ndarray, "N P 2"]]:
    """Patches of a picture at its own resolution, or of a video's frames, each so many of which are one picture.

    Args:
      moving: how many frames of a video are shown, these among them; 0 for a still picture.
    """
    rows, cols = spec.native.grid(*frames[0].size, spec.patch, spec.max_patches, moving)
    size, method = (cols * spec.patch, rows * spec.patch), FILTERS[spec.resample]
    pixels = [_normalise(frame.resize(size, method), spec) for frame in frames]
    # A still picture is its own next frame.
    return natives.cut(np.stack(pixels), spec.patch, spec.native)


def _cut(pixels: Float[np.ndarray, "rows cols 3"], spec: ImageSpec) -> tuple[np.ndarray, np.ndarray]:
    p = spec.patch
    rows, cols = pixels.shape[0] // p, pixels.shape[1] // p
    patches = pixels[: rows * p, : cols * p].reshape(rows, p, cols, p, 3).swapaxes(1, 2).reshape(rows * cols, -1)
    return np.ascontiguousarray(patches), _grid(rows, cols).copy()


@functools.lru_cache(maxsize=256)
def _grid(rows: int, cols: int) -> np.ndarray:
    """(row, column) of each patch, row by row."""
    return np.stack(np.indices((rows, cols), np.int32), axis=-1).reshape(-1, 2)


def _fit(image: PIL.Image.Image, spec: ImageSpec) -> PIL.Image.Image:
    """The picture at `size` x `size` (or its own size, for "naflex"), still 8 bits a channel."""
    method = FILTERS[spec.resample]
    width, height = image.size
    if spec.native is not None:
        rows, cols = spec.native.grid(width, height, spec.patch, spec.max_patches)
        return image.resize((cols * spec.patch, rows * spec.patch), method)
    if spec.fit == "naflex":
        rows, cols = naflex.fitted(width, height, spec.patch, spec.max_patches)
        return image.resize((cols * spec.patch, rows * spec.patch), method)
    if spec.fit == "pad" and width != height:
        side = max(width, height)
        _check_room(side, side, image, spec)
        # The released processors truncate the mean colour, they do not round it.
        square = PIL.Image.new("RGB", (side, side), tuple(int(m * 255) for m in spec.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if spec.fit != "crop":
        return image.resize((spec.size, spec.size), method)
    edge = spec.shortest or spec.size
    if width <= height:
        new = (edge, int(edge * height / width))
    else:
        new = (int(edge * width / height), edge)
    _check_room(*new, image, spec)
    image = image.resize(new, method)
    left, top = (new[0] - spec.size) // 2, (new[1] - spec.size) // 2
    return image.crop((left, top, left + spec.size, top + spec.size))


def _check_room(width: int, height: int, image: PIL.Image.Image, spec: ImageSpec) -> None:
    """A 1 x 3000 picture would grow to hundreds of megapixels on its way to a square."""
    if width * height > spec.max_pixels:
        raise ImageError(
            f"<picture of {image.width} x {image.height}>: it is so narrow that fit={spec.fit!r} would make it "
            f"{width} x {height} first, more than {spec.max_pixels:,} pixels; cut it, or use fit='squash'"
        )
