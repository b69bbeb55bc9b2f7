"""Random changes of a training picture: Pillow and numpy alone."""

import dataclasses

import numpy as np
import PIL.Image

from lvlm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Which changes, as a recipe names them; the fields are those of `augment`."""

    flip: bool = False
    crop: float = 0.0
    shift: int = 0
    zoom: float = 0.0
    rotate: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("crop", 1), ("zoom", 1), ("colour", 1), ("rotate", 180.0001)):
            if not 0 <= getattr(self, name) < most:
                raise ConfigError(f"augment.{name}={getattr(self, name)}: from 0 (off) to below {most:g}")

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return self != Augment()


def augment(
    image: PIL.Image.Image,
    rng: np.random.Generator,
    flip: bool = True,
    crop: float = 0.0,
    shift: int = 0,
    zoom: float = 0.0,
    rotate: float = 0.0,
    colour: float = 0.0,
) -> PIL.Image.Image:
    """A mirrored (half of the time), cut, shifted, resized, turned and recoloured copy for training on little data.

    Args:
      crop: the least share of the area that is kept, of a part of any place and a shape from 3:4 to 4:3; 0 keeps all.
        What fits a picture into a square should squash it then: together they are torchvision's RandomResizedCrop.
      shift: the most pixels along each axis, in the picture's own pixels; edges are repeated into every gap.
      zoom: each side's scale is drawn from 1 - zoom to 1 + zoom, about the centre.
      rotate: the most degrees either way, about the centre.
      colour: brightness, contrast, saturation and each channel's gain are each drawn from 1 - colour to 1 + colour.
    """
    pixels = np.asarray(image)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if crop:
        pixels = pixels[_part(rng, *pixels.shape[:2], crop)]
    if shift:
        dy, dx = rng.integers(-shift, shift + 1, size=2).tolist()
        pixels = _window(pixels, -dy, -dx, *pixels.shape[:2])
    if zoom or rotate:
        scales, angle = 1 + rng.uniform(-zoom, zoom, 2), np.deg2rad(rng.uniform(-rotate, rotate))
        pixels = _warp(pixels, scales, angle)
    if colour:
        pixels = _recolour(pixels, *(1 + rng.uniform(-colour, colour, 3)), 1 + rng.uniform(-colour, colour, 3))
    return PIL.Image.fromarray(np.ascontiguousarray(pixels))


def _part(rng: np.random.Generator, height: int, width: int, least: float) -> tuple[slice, slice]:
    """A random part of a picture of `least` or more of its area; all of it where ten draws reach beyond it."""
    for _ in range(10):
        area, shape = height * width * rng.uniform(least, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        tall, wide = round((area / shape) ** 0.5), round((area * shape) ** 0.5)
        if 0 < tall <= height and 0 < wide <= width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            return slice(top, top + tall), slice(left, left + wide)
    return slice(0, height), slice(0, width)


def _window(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A part of a picture that may reach beyond it, where its edges are repeated."""
    rows = np.clip(np.arange(top, top + height), 0, pixels.shape[0] - 1)
    cols = np.clip(np.arange(left, left + width), 0, pixels.shape[1] - 1)
    return pixels[rows][:, cols]


def _warp(pixels: np.ndarray, scales: np.ndarray, angle: float) -> np.ndarray:
    """Turned by `angle` (radians) and scaled along its own axes about the centre; bilinear, edges repeated."""
    height, width = pixels.shape[:2]
    sin, cos = np.sin(angle), np.cos(angle)
    back = np.array([[cos / scales[1], sin / scales[1]], [-sin / scales[0], cos / scales[0]]])  # (x, y) out -> in
    half = np.array([width, height]) / 2
    gap = int(np.ceil(max(0, (np.abs(back) @ half - half).max())))
    padded = PIL.Image.fromarray(_window(pixels, -gap, -gap, height + 2 * gap, width + 2 * gap))
    offset = half + gap - back @ half
    rows = (*back[0], offset[0], *back[1], offset[1])
    return np.asarray(
        padded.transform((width, height), PIL.Image.Transform.AFFINE, rows, PIL.Image.Resampling.BILINEAR)
    )


def _recolour(
    pixels: np.ndarray, brightness: float, contrast: float, saturation: float, gains: np.ndarray
) -> np.ndarray:
    """Saturation about each pixel's grey, contrast about the picture's mean, then brightness and channel gains."""
    wide = pixels.astype(np.float32)
    grey = (wide @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    wide = grey + (wide - grey) * np.float32(saturation)
    wide = (grey.mean() + (wide - grey.mean()) * np.float32(contrast)) * (brightness * gains).astype(np.float32)
    return np.rint(np.clip(wide, 0, 255)).astype(np.uint8)
