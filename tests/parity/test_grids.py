"""A position table at other grids, against torch's own resize: per picture, several pictures in a row."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvlm_jax.nn import grids
from tests.parity import compare

MODES = {
    "linear_antialias": {"mode": "bilinear", "antialias": True},
    "linear_corners": {"mode": "bilinear", "align_corners": True},
    "cubic": {"mode": "bicubic"},
    "cubic_antialias": {"mode": "bicubic", "antialias": True},
}
SIZES = [(6, 6), (3, 9), (1, 14), (11, 2)]


def row(sizes):
    """Pictures of these grids side by side in one vision row, with padding behind."""
    places = [np.stack(np.meshgrid(range(h), range(w), indexing="ij"), -1).reshape(-1, 2) for h, w in sizes]
    ids = [np.full(len(place), n + 1) for n, place in enumerate(places)]
    pad = lambda parts, *shape: np.concatenate([*parts, np.zeros((5, *shape), int)])[None]  # noqa: E731
    return jnp.asarray(pad(places, 2)), jnp.asarray(pad(ids))


def reference(table, kind, **size):
    image = torch.tensor(table).reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    out = torch.nn.functional.interpolate(image, **size, **{"align_corners": False, **MODES[kind]})
    return out[0].permute(1, 2, 0).reshape(-1, table.shape[1])


@pytest.mark.parametrize("kind", grids.RESIZES)
def test_every_picture_at_its_own_grid(kind):
    table = np.random.default_rng(0).normal(size=(36, 5)).astype(np.float32)
    positions, segments = row(SIZES)
    out, at = grids.resized(jnp.asarray(table), positions, segments, 6, kind)[0], 0
    assert np.isfinite(np.asarray(out)).all()
    np.testing.assert_array_equal(out[:36], table)  # its own grid: a look-up
    for size in SIZES:
        count = size[0] * size[1]
        compare.close(out[at : at + count], reference(table, kind, size=size), f"{kind} to {size}")
        at += count


def test_the_offset_of_dinov2s_authors():
    """Their code scales by (new side + 0.1) / old side."""
    table = np.random.default_rng(0).normal(size=(36, 5)).astype(np.float32)
    positions, segments = row([(4, 9)])
    out = grids.resized(jnp.asarray(table), positions, segments, 6, "cubic", offset=0.1)[0, :36]
    compare.close(out, reference(table, "cubic", scale_factor=(4.1 / 6, 9.1 / 6)), "cubic with offset")
