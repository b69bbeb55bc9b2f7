import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvlm_jax import mesh as M
from lvlm_jax.nn.linear import abstract, init, linear

SIZES = {"DP": (8, 1, 1), "FSDP": (1, 8, 1), "FSDP_TP": (1, 4, 2)}


@pytest.mark.parametrize("preset", M.PRESETS)
def test_a_mesh_covers_all_devices(preset):
    mesh = M.make_mesh(preset)
    assert mesh.axis_names == M.MESH_AXES
    assert tuple(mesh.shape.values()) == SIZES[preset]
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    assert tuple(M.make_mesh("FSDP", devices=jax.devices()[:2]).shape.values()) == (1, 2, 1)
    assert tuple(M.make_mesh("FSDP_TP", tensor=4).shape.values()) == (1, 2, 4)
    assert tuple(M.make_mesh("FSDP_TP", devices=jax.devices()[:1]).shape.values()) == (1, 1, 1)
    with pytest.raises(ValueError, match="8 devices do not divide into a tensor axis of 3"):
        M.make_mesh("FSDP_TP", tensor=3)
    with pytest.raises(ValueError, match="unknown mesh preset 'TP'; the presets are DP, FSDP, FSDP_TP"):
        M.make_mesh("TP")


def test_every_rule_speaks_of_axes_that_there_are():
    for rules in M.PRESETS.values():
        assert set(rules) <= set(M.AXES)
        assert {axis for axes in rules.values() for axis in axes} <= set(M.MESH_AXES)


SPECS = [
    ("DP", ("embed", "mlp"), (16, 32), (None, None)),
    ("FSDP", ("embed", "mlp"), (16, 32), ("fsdp", None)),
    ("FSDP_TP", ("embed", "mlp"), (16, 32), ("fsdp", "tensor")),
    ("FSDP_TP", ("layers", "mlp", "embed"), (3, 32, 16), (None, "tensor", "fsdp")),
    ("FSDP", ("vocab", "embed"), (33, 16), (None, "fsdp")),
    ("FSDP_TP", ("vocab", "embed"), (33, 16), (None, "fsdp")),  # 33 words do not divide by 2
    ("FSDP", ("embed",), (12,), (None,)),  # nor 12 by 8
    ("FSDP", ("embed", "embed"), (16, 16), ("fsdp", None)),  # a mesh axis cuts one axis only
    ("FSDP", ("batch", None), (16, 4), (("data", "fsdp"), None)),
    ("FSDP", (None, None), (16, 16), (None, None)),
    ("FSDP", ("patch", "heads"), (16, 16), (None, None)),
]


@pytest.mark.parametrize(("preset", "names", "shape", "expected"), SPECS)
def test_spec(preset, names, shape, expected):
    mesh = M.make_mesh(preset)
    found = M.spec(mesh, names, shape)
    assert found == PartitionSpec(*expected)
    jax.device_put(jnp.zeros(shape), NamedSharding(mesh, found))  # what was cut divides


def test_spec_of_a_leaf_without_names_is_whole():
    assert M.spec(M.make_mesh("FSDP"), None, (16, 16)) == PartitionSpec()


def test_unknown_and_missing_names():
    mesh = M.make_mesh("FSDP")
    with pytest.raises(ValueError, match="unknown logical axis 'embd'; the axes are batch, length, embed, mlp"):
        M.spec(mesh, ("embd", "mlp"), (16, 16))
    with pytest.raises(ValueError, match=r"1 axis names \('embed',\) for a shape \(16, 16\)"):
        M.spec(mesh, ("embed",), (16, 16))
    x = jnp.zeros((16, 4))
    with pytest.raises(ValueError, match="unknown logical axis 'bacth'"):
        M.constrain(x, ("bacth", None))
    with pytest.raises(ValueError, match=r"1 axis names \('batch',\) for an array of 2 axes \(16, 4\)"):
        M.constrain(x, ("batch",))
    with pytest.raises(ValueError, match="unknown logical axis 'widht'"):
        linear(4, ("embed", "widht"))


def test_constrain_is_nothing_outside_a_mesh():
    text = str(jax.make_jaxpr(lambda x: M.constrain(x, ("batch", None)))(jnp.zeros((16, 4))))
    assert "sharding_constraint" not in text
    with M.use(None):
        text = str(jax.make_jaxpr(lambda x: M.constrain(x, ("batch", None)))(jnp.zeros((16, 4))))
    assert "sharding_constraint" not in text


@pytest.mark.parametrize("preset", M.PRESETS)
def test_constrain_stands_in_the_program_and_holds(preset):
    mesh = M.make_mesh(preset)

    def double(x):
        return M.constrain(x * 2, ("batch", None))

    with M.use(mesh):
        text = str(jax.make_jaxpr(double)(jnp.zeros((16, 4))))
        got = jax.jit(double)(jnp.ones((16, 4)))
    assert "sharding_constraint" in text
    ways = {"DP": 8, "FSDP": 8, "FSDP_TP": 4}[preset]
    assert got.addressable_shards[0].data.shape == (16 // ways, 4)
    np.testing.assert_array_equal(got, np.full((16, 4), 2.0))


class Mlp(nn.Module):
    """Two layers, so that each axis stands on either side."""

    @nn.compact
    def __call__(self, x):
        x = linear(32, ("embed", "mlp"), use_bias=True, name="up")(x)
        return linear(16, ("mlp", "embed"), name="down")(nn.silu(x))


@pytest.mark.parametrize("preset", M.PRESETS)
def test_shardings_of_a_module(preset):
    mesh, x = M.make_mesh(preset), jnp.ones((8, 16))
    shapes, axes = abstract(Mlp(), x)
    assert axes == {"down": {"kernel": ("mlp", "embed")}, "up": {"bias": ("mlp",), "kernel": ("embed", "mlp")}}
    where = M.shardings(mesh, axes, shapes)
    params = init(Mlp(), jax.random.key(0), x)
    placed = jax.device_put(params, where)
    parts = jax.tree.map(lambda leaf: leaf.size // leaf.addressable_shards[0].data.size, placed)
    kernel, bias = {"DP": (1, 1), "FSDP": (8, 1), "FSDP_TP": (8, 2)}[preset]
    assert parts == {"down": {"kernel": kernel}, "up": {"bias": bias, "kernel": kernel}}
    with M.use(mesh):
        got = jax.jit(Mlp().apply)({"params": placed}, jax.device_put(x, M.batch_sharding(mesh)))
    np.testing.assert_allclose(got, Mlp().apply({"params": params}, x), rtol=1e-5, atol=1e-6)
    whole = M.shardings(mesh, None, shapes)
    assert {leaf.spec for leaf in jax.tree.leaves(whole)} == {PartitionSpec()}


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, jnp.float32),
        ("tpu", None, jnp.bfloat16),
        ("gpu", "7.5", jnp.float16),
        ("gpu", "9.0", jnp.bfloat16),
        ("gpu", "gfx942", jnp.bfloat16),
    ],
)
def test_the_default_dtype_is_what_the_device_is_good_at(monkeypatch, platform, capability, expected):
    @dataclasses.dataclass
    class Device:
        platform: str
        compute_capability: str | None

    monkeypatch.setattr(jax, "devices", lambda: [Device(platform, capability)])
    dtype, why = M.compute_dtype()
    assert dtype == expected
    assert why.startswith(platform)
