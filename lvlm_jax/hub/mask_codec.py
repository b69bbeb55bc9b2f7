"""PaliGemma's codec of masks from the authors' file, ``vae-oid.npz`` (gs://big_vision/paligemma/vae-oid.npz)."""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import keymap
from lvlm_jax import params as trees
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.npz import NpzFile
from lvlm_jax.nn.linear import abstract
from lvlm_jax.shapes import Float, Int, Params
from lvlm_jax.vision import mask_codec


def load(path: str | os.PathLike) -> Params:
    """The parameters of `vision.mask_codec.MaskCodec`, float32.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: another model's file: keys or shapes that differ, each named.
    """
    file = NpzFile(path)
    table, shapes = mask_codec.rows(), trees.flatten(abstract(mask_codec.MaskCodec(), jnp.zeros((1, 64, 64)))[0])
    try:
        keymap.check(table, shapes, [key for key in file if key not in mask_codec.UNUSED], str(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    leaves = {ours: leaf for row in table for ours, leaf in row.load(file.read(row.theirs)).items()}
    for ours, leaf in leaves.items():
        if leaf.shape != shapes[ours].shape:
            raise CheckpointError(f"{path}: {ours} has the shape {leaf.shape}, the codec's is {shapes[ours].shape}")
    return trees.unflatten({ours: jnp.asarray(leaf, jnp.float32) for ours, leaf in leaves.items()})


class Codec(NamedTuple):
    """Both ways with weights in them, numpy to numpy: masks [N, 64, 64] in [0, 1] to codes [N, 16], and codes to masks.

    `processing.masks` cuts a picture's mask to that size and puts one back; `evaluate.scores.segmentation` takes
    `decode`.
    """

    encode: Callable[[Float[np.ndarray, "N 64 64"]], Int[np.ndarray, "N 16"]]
    decode: Callable[[Int[np.ndarray, "N 16"]], Float[np.ndarray, "N 64 64"]]


def codec(path: str | os.PathLike) -> Codec:
    """The codec of a file; raises as `load`."""
    params, module = load(path), mask_codec.MaskCodec()

    def run(method: str) -> Callable:
        apply = jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))
        return lambda x: np.asarray(apply(params, jnp.asarray(x)))

    return Codec(run("encode"), run("decode"))
