"""The formats that a checkpoint comes in: a folder of safetensors files with config.json, or a model in one file."""

from pathlib import Path
from typing import Any

from lvlm_jax.hub import gguf, npz
from lvlm_jax.hub.configs import read_json
from lvlm_jax.hub.gguf import GgufFile
from lvlm_jax.hub.npz import NpzFile
from lvlm_jax.hub.safetensors_io import Overlay, TensorFolder

Tensors = TensorFolder | Overlay | GgufFile | NpzFile
"""Tensors by key, one read at a time; `path`, `shape`, `dtype` and `file` tell of them without reading."""

OPEN = {".gguf": GgufFile, ".npz": NpzFile}
"""Suffix of a model file -> what reads its tensors; anything else is a folder."""
CONFIG = {".gguf": gguf.public_config, ".npz": npz.public_config}
"""Suffix of a model file -> what makes a config.json of it."""


def opened(path: Path) -> Tensors:
    """The tensors of a checkpoint; only headers are read."""
    return OPEN.get(path.suffix if path.is_file() else "", TensorFolder)(path)


def public_config(path: Path) -> dict[str, Any]:
    """The config.json of a checkpoint, or what its file says in the same words."""
    return CONFIG[path.suffix](path) if path.is_file() else read_json(path / "config.json")
