"""Axis names: written once where a weight is born, checked there, and standing in the program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lvlm_jax import mesh as M
from lvlm_jax.nn.linear import abstract, init, linear, named


def test_a_misspelt_axis_is_an_error():
    with pytest.raises(ValueError, match=r"unknown logical axis 'embd'.*embed"):
        linear(4, ("embd", "mlp"))
    with pytest.raises(ValueError, match="unknown logical axis"):
        named(nn.initializers.ones, ("widht",))
    with pytest.raises(ValueError, match="unknown logical axis"):
        M.constrain(jnp.ones((2, 2)), ("batch", "lenght"))


def test_names_and_axes_must_be_as_many():
    with pytest.raises(ValueError, match="2 axis names"):
        M.constrain(jnp.ones((2, 2, 2)), ("batch", "length"))


def test_constraint_stands_in_the_program():
    x = jnp.ones((8, 4, 2))
    step = lambda x: M.constrain(x * 2, ("batch", "length", None))  # noqa: E731
    assert "sharding_constraint" not in str(jax.make_jaxpr(step)(x))
    with M.use(M.make_mesh("FSDP_TP")):
        assert "sharding_constraint" in str(jax.make_jaxpr(step)(x))


def test_parameters_come_out_plain():
    module = linear(4, ("embed", "mlp"), use_bias=True)
    params = init(module, jax.random.key(0), jnp.ones((1, 3)))
    assert jax.tree.map(jnp.shape, params) == {"kernel": (3, 4), "bias": (4,)}
    assert type(params["kernel"]) is type(jnp.ones(1))
    shapes, axes = abstract(module, jnp.ones((1, 3)))
    assert axes == {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
    assert shapes["kernel"].shape == (3, 4)
