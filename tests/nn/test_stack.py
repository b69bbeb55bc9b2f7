"""A stack of layers: scanned equals per layer, rematerialised equals not, the first few layers alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax.nn.linear import init, linear
from lvlm_jax.nn.stack import REMAT, make_stack, run_stack

DEPTH = 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, value, shift):
        y = x + jnp.tanh(linear(x.shape[-1], ("embed", "mlp"), name="dense")(x) + shift)
        return (y if value is None else y * value), y.mean()


class Model(nn.Module):
    scan: bool = False
    remat: str = "none"
    take: int | None = None

    @nn.compact
    def __call__(self, x, values=None):
        stack = make_stack(functools.partial(Block), DEPTH, self.scan, self.remat, name="layers")
        return run_stack(stack, DEPTH, x, values, jnp.float32(0.1), take=self.take)


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
PARAMS = init(Model(), jax.random.key(0), X)


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("scan", [False, True])
def test_all_shapes_agree(scan, remat):
    def loss(params, model):
        x, outs = model.apply({"params": params}, X)
        return (x**2).sum() + sum(outs)

    value, grads = jax.value_and_grad(loss)(PARAMS, Model())
    params = P.stack_layers(PARAMS) if scan else PARAMS
    got, got_grads = jax.value_and_grad(loss)(params, Model(scan=scan, remat=remat))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # gradients are of size 10
    jax.tree.map(close, P.unstack_layers(got_grads), grads)


@pytest.mark.parametrize("take", [0, 1, 2, 3])
def test_the_first_layers_alone(take):
    x = X
    for i in range(take):
        x, _ = Block().apply({"params": PARAMS["layers"][str(i)]}, x, None, jnp.float32(0.1))
    for scan in (False, True):
        params = P.stack_layers(PARAMS) if scan else PARAMS
        got, _ = Model(scan=scan, take=take).apply({"params": params}, X)
        np.testing.assert_allclose(got, x, rtol=1e-6)


def test_values_travel_with_the_layers():
    values = jnp.asarray([0.5, 2.0, 3.0])
    one, _ = Model().apply({"params": PARAMS}, X, tuple(values))
    other, _ = Model(scan=True).apply({"params": P.stack_layers(PARAMS)}, X, values)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match="unknown remat policy 'all'; the policies are none, full, attention, dots"):
        Model(remat="all").init(jax.random.key(0), X)


def test_a_recomputed_layer_keeps_nothing():
    def kept(remat):
        model = Model(remat=remat)
        _, pull = jax.vjp(lambda p: model.apply({"params": p}, X)[0], PARAMS)
        return len(jax.tree.leaves(pull))

    assert kept("full") < kept("none")
