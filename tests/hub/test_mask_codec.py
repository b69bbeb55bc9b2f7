"""The authors' file of the mask codec: names and shapes as published, and files that are another's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub import mask_codec as hub
from lvlm_jax.vision import mask_codec

SHAPES = {
    "_vq_vae._embedding": (128, 512),
    "encoder.0": (16, 1, 4, 4), "encoder.2": (32, 16, 4, 4), "encoder.4": (64, 32, 4, 4), "encoder.6": (128, 64, 4, 4),
    "encoder.10": (512, 128, 1, 1),
    "decoder.0": (128, 512, 1, 1), "decoder.4": (128, 128, 4, 4), "decoder.6": (128, 64, 4, 4),
    "decoder.8": (64, 32, 4, 4), "decoder.10": (32, 16, 4, 4), "decoder.12": (1, 16, 1, 1),
    **{f"{block}.net.{i}": (128, 128, side, side)
       for block in ("encoder.8", "encoder.9", "decoder.2", "decoder.3") for i, side in ((0, 3), (2, 3), (4, 1))},
}  # fmt: skip
"""Of the weights of ``vae-oid.npz``; see the sources of `vision.mask_codec`."""
TRANSPOSED = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")


@pytest.fixture(scope="module")
def arrays():
    rng, out = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        if name.startswith("_"):
            out[name] = rng.standard_normal(shape, np.float32)
            continue
        out[f"{name}.weight"] = rng.standard_normal(shape, np.float32)
        out[f"{name}.bias"] = rng.standard_normal(shape[1 if name in TRANSPOSED else 0], np.float32)
    return out


def test_the_authors_file_comes_in_and_nothing_is_left_over(arrays, tmp_path):
    trained = {
        "_vq_vae._ema_w": np.zeros((128, 512), np.float32),
        "_vq_vae._ema_cluster_size": np.zeros(128, np.float32),
    }
    np.savez(tmp_path / "vae-oid.npz", **arrays, **trained)
    params = hub.load(tmp_path / "vae-oid.npz")
    flat = P.flatten(params)
    assert {row.theirs for row in mask_codec.rows()} == arrays.keys()
    for row in mask_codec.rows():
        np.testing.assert_array_equal(row.save(flat), arrays[row.theirs], err_msg=row.theirs)


@pytest.mark.slow
def test_a_mask_goes_through_the_file_both_ways(arrays, tmp_path):
    np.savez(tmp_path / "vae-oid.npz", **arrays)
    codec, params = hub.codec(tmp_path / "vae-oid.npz"), hub.load(tmp_path / "vae-oid.npz")
    masks = (np.random.default_rng(1).random((2, 64, 64)) < 0.5).astype(np.float32)
    codes = codec.encode(masks)
    assert (codes.shape, codes.dtype) == ((2, 16), np.int32)
    assert 0 <= codes.min() <= codes.max() < 128
    apply = jax.jit(lambda codes: mask_codec.MaskCodec().apply({"params": params}, codes, method="decode"))
    np.testing.assert_array_equal(codec.decode(codes), apply(jnp.asarray(codes)))


def test_a_file_of_another_model(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **{k: v for k, v in arrays.items() if k != "encoder.10.bias"}, extra=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"(?s)missing \(1\): encoder.10.bias.*not used \(1\): extra"):
        hub.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **arrays | {"decoder.12.weight": np.zeros((3, 16, 1, 1), np.float32)})
    with pytest.raises(CheckpointError, match=r"decoder/out/kernel has the shape \(1, 1, 16, 3\), the codec's is"):
        hub.load(tmp_path / "b.npz")
