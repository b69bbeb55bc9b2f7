"""Named senses on the host: how their segments become rows of a batch, and how many positions each takes."""

import dataclasses
import zipfile
from pathlib import PurePath

import numpy as np

from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.picture import no_such_file
from lvlm_jax.processing.schema import Clip, Features, Image, Placed, Shown
from lvlm_jax.processing.video import read_rows
from lvlm_jax.shapes import Float, Int


class FeatureError(ValueError):
    """Features that cannot be read: the message names the file or array, what disagrees, and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SenseSpec:
    """How the segments of a named sense are read.

    tokens: positions of a full row (Q). length, width: patches of a row and values of each, or feature vectors of a row
    at most and values of each. image: how pictures are prepared; None where features are read. each: a token a feature,
    so that a row may be shorter than `length`; else what reads it needs all of them.
    """

    tokens: int
    length: int
    width: int
    image: ImageSpec | None = None
    each: bool = False

    def __post_init__(self) -> None:
        if self.image is not None and (self.image.patches, self.image.values) != (self.length, self.width):
            raise ValueError(
                f"image.size={self.image.size}, image.patch={self.image.patch} give {self.image.patches} patches of "
                f"{self.image.values} values, but the encoder reads {self.length} of {self.width}; they must be equal"
            )
        if self.image is not None and (self.image.tiles is not None or self.image.fit in ("naflex", "native")):
            raise ValueError(
                "image: pictures of a named sense are one row each; leave tiles out, and fit='naflex' or 'native'"
            )


def place(segment: Shown, name: str, spec: SenseSpec, start: int) -> Placed:
    """A segment with its positions from `start` on.

    Raises:
      FeatureError: features that cannot be read, or that are not of the sense's size.
      ValueError: a picture for a sense that reads features, or the reverse.
    """
    if isinstance(segment, Features) != (spec.image is None):
        wants, got = ("features", "a picture") if spec.image is None else ("pictures", "features")
        raise ValueError(f"sense {name!r} reads {wants}, but this is {got}; give {wants}, or name another sense")
    if isinstance(segment, Features):
        count = len(loaded(segment, spec))
        return Placed(segment, start, count if spec.each else spec.tokens)
    rows = len(segment.source.indices) if isinstance(segment.source, Clip) else 1
    return Placed(segment, start, rows * spec.tokens, rows)


def loaded(features: Features, spec: SenseSpec) -> Float[np.ndarray, "n C"]:
    """The features as float32, checked against the sense's size."""
    name, array = described(features), _read(features)
    if array.ndim != 2 or not len(array):
        raise FeatureError(f"{name}: shape {list(array.shape)}; features are float[n, C], n of C values, n >= 1")
    field = f"config.model.senses.{features.sense}.encoder"
    if array.shape[1] != spec.width:
        raise FeatureError(
            f"{name}: vectors of {array.shape[1]} values, but sense {features.sense!r} reads {spec.width} "
            f"({field}.width); compute them as those that the model was trained on"
        )
    if len(array) > spec.length:
        raise FeatureError(
            f"{name}: {len(array)} feature vectors, but sense {features.sense!r} has room for {spec.length} "
            f"({field}.length); shorten or pool them, or raise it"
        )
    if not spec.each and len(array) != spec.length:
        raise FeatureError(
            f"{name}: {len(array)} feature vectors, but the connector of sense {features.sense!r} reads all "
            f"{spec.length} of a row ({field}.length); resample them, or take a connector that reads one at a time "
            "(linear, mlp)"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise FeatureError(f"{name}: holds values that are not finite; compute it again")
    return array


def read(one: Placed, spec: SenseSpec) -> tuple[Float[np.ndarray, "N P C"], Int[np.ndarray, "N P 2"]]:
    """(patches, positions) of a placed segment, a row each; a feature's position is (0, its place)."""
    if isinstance(one.segment, Image):
        return read_rows(one.segment, spec.image)
    array = loaded(one.segment, spec)
    places = np.stack([np.zeros(len(array), np.int32), np.arange(len(array), dtype=np.int32)], axis=-1)
    return array[None], places[None]


def described(features: Features) -> str:
    """What a message calls them."""
    if isinstance(features.source, str):
        return features.source + (f" ({features.key})" if features.key else "")
    return f"features of sense {features.sense!r}"


def _read(features: Features) -> np.ndarray:
    """The array, of whatever numbers it has."""
    source = features.source
    if not isinstance(source, str):
        try:
            array = np.asarray(source)
        except ValueError as error:  # lists of several lengths
            raise FeatureError(f"{described(features)}: {error}; features are float[n, C]") from error
    else:
        array = _file(features)
    if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
        raise FeatureError(f"{described(features)}: holds {array.dtype}, not numbers; features are float[n, C]")
    return array


def _file(features: Features) -> np.ndarray:
    path = features.source
    if PurePath(path).suffix not in (".npy", ".npz"):
        raise FeatureError(f"{path}: features come as .npy or .npz files; save them with numpy.save")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            keys = list(found)
            key = features.key or (keys[0] if len(keys) == 1 else "")
            if key not in keys:
                wanted = f"no array {key!r}" if key else f"{len(keys)} arrays"
                raise FeatureError(f"{path}: {wanted} in it; name one of {', '.join(keys)} as key")
            return found[key]
    except FileNotFoundError as error:
        raise FeatureError(no_such_file(path, features.under)) from error
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise FeatureError(f"{path}: cannot be read ({error}); save it again with numpy.save") from error
    except ValueError as error:
        if isinstance(error, FeatureError):
            raise
        raise FeatureError(f"{path}: no array of numbers ({error}); save it again with numpy.save") from error
