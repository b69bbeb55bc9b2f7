import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lvlm_jax import mesh as M
from lvlm_jax.nn.linear import abstract, init, linear

SIZES = {"DP": (8, 1, 1), "FSDP": (1, 8, 1), "FSDP_TP": (1, 4, 2), "FSDP_TP_SP": (1, 4, 2, 1)}


@pytest.mark.parametrize("preset", M.PRESETS)
def test_a_mesh_covers_all_devices(preset):
    mesh = M.make_mesh(preset)
    assert mesh.axis_names[:3] == M.MESH_AXES
    assert tuple(mesh.shape.values()) == SIZES[preset]
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    assert tuple(M.make_mesh("FSDP", devices=jax.devices()[:2]).shape.values()) == (1, 2, 1)
    assert tuple(M.make_mesh("FSDP_TP", tensor=4).shape.values()) == (1, 2, 4)
    assert tuple(M.make_mesh("FSDP_TP", devices=jax.devices()[:1]).shape.values()) == (1, 1, 1)
    with pytest.raises(ValueError, match="8 devices do not divide into a tensor axis of 3"):
        M.make_mesh("FSDP_TP", tensor=3)
    with pytest.raises(ValueError, match="unknown mesh preset 'TP'; the presets are DP, FSDP, FSDP_TP, FSDP_TP_SP"):
        M.make_mesh("TP")


def test_weights_cut_over_fewer_devices_than_there_are():
    assert tuple(M.make_mesh("FSDP", fsdp=4).shape.values()) == (2, 4, 1)
    assert tuple(M.make_mesh("FSDP_TP", tensor=2, fsdp=2).shape.values()) == (2, 2, 2)
    with pytest.raises(ValueError, match="8 devices do not divide into an fsdp axis of 3"):
        M.make_mesh("FSDP", fsdp=3)
    with pytest.raises(ValueError, match="8 devices do not divide into an fsdp axis of 8 beside a tensor axis of 2"):
        M.make_mesh("FSDP_TP", fsdp=8)
    with pytest.raises(ValueError, match="fsdp=2: DP cuts no weight"):
        M.make_mesh("DP", fsdp=2)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as its driver describes it."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5e"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices, side):
    where = [(s, x, y) for s in range(slices) for y in range(side) for x in range(side)]
    return [Chip(i, (x, y, 0), s) for i, (s, x, y) in enumerate(where)]


@pytest.mark.parametrize(("preset", "sizes"), [("DP", (32, 1, 1)), ("FSDP", (2, 16, 1)), ("FSDP_TP", (2, 8, 2))])
def test_the_data_axis_runs_over_slices(preset, sizes):
    found = chips(2, 4)
    assert M.slices_of(found) == 2
    assert M._sizes(preset, 32, 2, None, None) == sizes
    order = M._arranged(found, sizes)
    assert order.shape == sizes
    assert {chip.slice_index for chip in order[: sizes[0] // 2].flat} == {0}
    assert {chip.slice_index for chip in order[sizes[0] // 2 :].flat} == {1}
    with pytest.raises(ValueError, match="16 devices of each of 2 slices do not divide into an fsdp axis of 32"):
        M._sizes("FSDP", 32, 2, None, 32)


def test_meshes_of_two_presets_keep_their_own_rules():
    plain, cut = M.make_mesh("FSDP_TP"), M.make_mesh("FSDP_TP_SP")
    stream = ("batch", "length", None)
    assert M.spec(plain, stream, (16, 6, 4)) == PartitionSpec(("data", "fsdp"), None, None)
    assert M.spec(cut, stream, (16, 6, 4)) == PartitionSpec(("data", "fsdp"), "tensor", None)


@pytest.mark.parametrize("side", [{"tensor": 0}, {"fsdp": -1}])
def test_a_side_of_no_devices(side):
    with pytest.raises(ValueError, match="at least 1"):
        M.make_mesh("FSDP_TP", **side)


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
    ("FSDP_TP", ("batch", "length", None), (16, 6, 4), (("data", "fsdp"), None, None)),
    ("FSDP_TP_SP", ("batch", "length", None), (16, 6, 4), (("data", "fsdp"), "tensor", None)),
    ("FSDP_TP_SP", ("batch", "length", None), (16, 1, 4), (("data", "fsdp"), None, None)),  # a step of decoding
    ("FSDP_TP_SP", ("embed", "mlp"), (16, 32), ("fsdp", "tensor")),
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
    ways = {"DP": 8, "FSDP": 8, "FSDP_TP": 4, "FSDP_TP_SP": 4}[preset]
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
    kernel, bias = {"DP": (1, 1), "FSDP": (8, 1), "FSDP_TP": (8, 2), "FSDP_TP_SP": (8, 2)}[preset]
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
