"""big_vision's checkpoints: one ``.npz`` of flat keys (``params/img/...``), read without pickle, a tensor at a time."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.safetensors_io import ByKey
from lvlm_jax.vision import vit_jax
from lvlm_jax.zoo import big_vision, big_vision_gemma

PREFIX = "params/"
"""What the keys of the weights begin with, in a checkpoint that holds an optimizer's state beside them."""

_BFLOAT16 = np.dtype("V2")
"""How numpy, which does not know bfloat16, writes it down."""


class NpzFile(ByKey):
    """The weights of a file under its own keys, less ``params/``; only headers are read until `read` is called.

    Raises:
      CheckpointError: not a whole ``.npz``, or a member that only pickle could read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._entries: dict[str, tuple[str, tuple[int, ...], np.dtype]] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                some = any(name.startswith(PREFIX) for name in names)
                for name in names:
                    if some and not name.startswith(PREFIX):
                        continue  # the optimizer's state
                    with archive.open(name) as stream:
                        shape, dtype = _header(stream)
                    if dtype.hasobject:
                        raise CheckpointError(
                            f"{self.path}: {name} holds Python objects, a pickle, which runs code when it is read, so "
                            "it is refused; save the weights again as one plain array a key"
                        )
                    key = name.removesuffix(".npy").removeprefix(PREFIX)
                    self._entries[key] = (name, shape, np.dtype(ml_dtypes.bfloat16) if dtype == _BFLOAT16 else dtype)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: not a whole .npz file ({error}); fetch or copy it again") from error
        if not self._entries:
            raise CheckpointError(f"{self.path}: holds no array; is it a checkpoint of big_vision?")

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._entries[key][1]

    def dtype(self, key: str) -> np.dtype:
        """Number type of one tensor."""
        return self._entries[key][2]

    def file(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self.path

    def read(self, key: str) -> np.ndarray:
        """One tensor, as it is in the file (bfloat16 stays bfloat16)."""
        name, _, dtype = self._entries[key]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(name) as stream:
                tensor = np.lib.format.read_array(stream, allow_pickle=False)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {key!r} is damaged ({error}); fetch or copy it again"
            ) from error
        return tensor.view(dtype) if tensor.dtype != dtype else tensor


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, number type) of an array, whose numbers are not read."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


CONFIGS: dict[str, Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]] = {
    "txt/": big_vision.public_config,
    "llm/": big_vision_gemma.public_config,
    "cls": vit_jax.public_config,
}
"""Prefix that a kind of model is known by -> what makes a config.json of its shapes."""


def public_config(path: str | Path) -> dict[str, Any]:
    """The config.json that the torch library would have for the model of a file: its shapes tell.

    Raises:
      CheckpointError: a model that is not known here.
    """
    tensors = NpzFile(path)
    shapes = {key: tensors.shape(key) for key in tensors}
    for prefix, read in CONFIGS.items():
        if any(key.startswith(prefix) for key in shapes):
            try:
                return read(shapes)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
    raise CheckpointError(
        f"{path}: none of its keys begins with {', '.join(CONFIGS)}, so which model it is is not known; the first are "
        f"{', '.join(sorted(shapes)[:6])}. Read here: SigLIP's two towers (img/, txt/), PaliGemma (img/, "
        "llm/), ViT (cls)"
    )
