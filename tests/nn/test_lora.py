"""Adapters beside kernels: found by the dense layer, drawn alike in both shapes of a stack, merged without loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn import lora, quant
from lvlm_jax.nn.linear import abstract
from lvlm_jax.nn.lora import Lora
from tests import tiny

CONFIG = tiny.SYSTEMS["llava15"]
EVERY = Lora(targets=("llm/**/attn/{q,k,v,o}", "llm/layers/*/mlp/up/kernel", "connector/linear_1"), rank=3, alpha=5.0)


def model(scan=False):
    return LVLM(CONFIG, scan=scan)


def run(scan):
    return tiny.jit(lambda p, b: model(scan).apply({"params": p}, b, method=tiny.logits))


RUN = {scan: run(scan) for scan in (False, True)}


def adapted(config=EVERY, scan=False, seed=0):
    """(params with adapters whose `b` is not zero, axes), all random."""
    base = jax.tree.map(jnp.asarray, tiny.weights(CONFIG, seed))
    base = P.stack_layers(base) if scan else base
    axes = abstract(model(scan), dummy_batch(CONFIG))[1]
    flat = P.flatten(lora.add(base, axes, config, jax.random.key(1)))
    rng = np.random.default_rng(2)
    for path in (path for path in P.flatten(P.unstack_layers(P.unflatten(flat))) if path.endswith(lora.B)):
        stack, index = P.stack_path(path) if scan else (path, None)
        noise = rng.normal(size=flat[stack].shape[index is not None :]).astype(np.float32) / 3
        flat[stack] = flat[stack].at[index].set(noise) if index is not None else jnp.asarray(noise)
    return P.unflatten(flat), axes


def logits(params, scan=False):
    batch, _ = tiny.batch(CONFIG, [[2, tiny.IMAGE, 3], [9]])
    return np.asarray(RUN[scan](params, batch))


def test_fresh_adapters_change_nothing_and_stand_where_the_patterns_say():
    base = jax.tree.map(jnp.asarray, tiny.weights(CONFIG))
    axes = abstract(model(), dummy_batch(CONFIG))[1]
    params = lora.add(base, axes, EVERY, jax.random.key(0))
    new = sorted(set(P.flatten(params)) - set(P.flatten(base)))
    beside = [f"llm/layers/{i}/{x}" for i in range(2) for x in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up")]
    assert new == sorted(f"{x}/{name}" for x in [*beside, "connector/linear_1"] for name in lora.NAMES)
    assert params["llm"]["layers"]["0"]["attn"]["q"][lora.A].shape == (32, 3)
    assert float(params["llm"]["layers"]["1"]["mlp"]["up"][lora.SCALE]) == pytest.approx(5 / 3)
    np.testing.assert_array_equal(logits(params), logits(base))
    for path, leaf in P.flatten(params).items():
        if path.endswith(lora.A):
            bound = leaf.shape[0] ** -0.5
            assert 0.8 * bound < np.abs(leaf).max() <= bound, path


def test_both_shapes_of_a_stack_draw_the_same_numbers_and_give_the_same_model():
    apart, scanned = adapted()[0], adapted(scan=True)[0]
    jax.tree.map(np.testing.assert_array_equal, P.unstack_layers(scanned), apart)
    np.testing.assert_allclose(logits(scanned, scan=True), logits(apart), atol=2e-5 * np.abs(logits(apart)).max())


@pytest.mark.parametrize("scan", [False, True])
def test_merged_equals_unmerged(scan):
    params, _ = adapted(scan=scan)
    whole = lora.merge(params)
    assert not any(map(lora.is_adapter, P.flatten(whole)))
    got, wanted = logits(whole, scan), logits(params, scan)
    assert np.abs(wanted - logits(lora.split(params)[0], scan)).max() > 0.1
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_adapters_from_disk_merge_layer_by_layer_into_a_scanned_stack():
    params, _ = adapted(Lora(targets=("llm/layers/1/attn/q",), rank=2))
    base, low = lora.split(params)
    got = P.unstack_layers(lora.merge(P.stack_layers(base), low))
    jax.tree.map(np.testing.assert_array_equal, got, lora.merge(params))


def test_axes_of_adapters_follow_their_kernels():
    shapes, axes = abstract(model(scan=True), dummy_batch(CONFIG))
    grown, names = lora.add_shapes(shapes, axes, EVERY)
    assert P.flatten(grown).keys() == P.flatten(names).keys()
    q = names["llm"]["layers"]["attn"]["q"]
    assert (q["kernel"], q[lora.A], q[lora.B], q[lora.SCALE]) == (
        ("layers", "embed", "heads"),
        ("layers", "embed", None),
        ("layers", None, "heads"),
        ("layers",),
    )
    assert grown["llm"]["layers"]["attn"]["q"][lora.B].shape == (2, 3, 64)


def test_the_scale():
    assert Lora(targets=("a",), rank=16, alpha=32.0).scale == 2.0
    assert Lora(targets=("a",), rank=16, alpha=32.0, rslora=True).scale == 8.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": ()}, r"lora.targets=\(\)"),
        ({"rank": 0}, "lora.rank=0"),
        ({"alpha": -1.0}, "lora.alpha=-1.0"),
    ],
)
def test_bad_values_name_the_field(change, says):
    with pytest.raises(ValueError, match=says):
        Lora(**({"targets": ("llm/**",)} | change))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("llm/layers/*/attn/query", "'llm/layers/\\*/attn/query' matches nothing.*near: .*llm/layers/0/attn/"),
        ("llm/head", "lora.targets, which name dense layers: .*'llm/head' matches nothing"),
        ("llm/embed/table", "matches nothing"),
        ("llm/layers/*/norm1", "matches nothing"),
    ],
)
def test_a_pattern_that_takes_no_dense_layer(pattern, says):
    shapes, axes = abstract(model(), dummy_batch(CONFIG))
    with pytest.raises(ValueError, match=says):
        lora.targets(shapes, axes, (pattern,))


def test_some_layers_of_a_scanned_stack():
    shapes, axes = abstract(model(scan=True), dummy_batch(CONFIG))
    with pytest.raises(ValueError, match="is a scanned stack"):
        lora.targets(shapes, axes, ("llm/layers/1/attn/q",))


def test_an_adapter_of_another_model():
    params, _ = adapted()
    base, low = lora.split(params)
    del base["llm"]["layers"]["0"]["attn"]["q"]["kernel"]
    with pytest.raises(ValueError, match="llm/layers/0/attn/q/kernel, which this model does not have"):
        lora.merge(base, low)
    base["llm"]["layers"]["0"]["attn"]["q"]["kernel"] = jnp.zeros((32, 48))
    with pytest.raises(ValueError, match=r"does not fit a kernel \[32, 48\]"):
        lora.merge(base, low)


@pytest.mark.slow
def test_gradients_of_adapters_are_the_chain_rule_through_the_full_gradient():
    """dL/da = scale * G b^T and dL/db = scale * a^T G, with G the gradient of the merged kernel."""
    params, _ = adapted()
    batch, _ = tiny.batch(CONFIG, [[2, tiny.IMAGE, 3], [9]])
    pull = np.random.default_rng(3).normal(size=(*batch.tokens.shape, 99)).astype(np.float32)
    batch = jax.tree.map(jnp.asarray, batch)
    loss = jax.jit(lambda p: (model().apply({"params": p}, batch, method=tiny.logits) * pull).sum())
    full = P.flatten(jax.grad(loss)(lora.merge(params)))
    base, low = lora.split(params)
    own = P.flatten(jax.grad(lambda low: loss(P.merge(base, low)))(low))
    flat = P.flatten(params)
    for path in (path for path in own if path.endswith(lora.A)):
        kernel, b = path.removesuffix(lora.A) + "kernel", path.removesuffix(lora.A) + lora.B
        scale, g = float(flat[lora.beside(kernel, lora.SCALE)]), np.asarray(full[kernel], np.float64)
        for name, wanted in ((path, scale * g @ np.asarray(flat[b]).T), (b, scale * np.asarray(flat[path]).T @ g)):
            np.testing.assert_allclose(own[name], wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0, err_msg=name)
    # Not only what autodiff says: a small step along a random direction.
    direction = {p: np.random.default_rng(4).normal(size=x.shape) for p, x in P.flatten(low).items()}
    step = lambda e: loss(P.merge(base, P.unflatten({p: x + e * direction[p] for p, x in P.flatten(low).items()})))  # noqa: E731
    slope = (float(step(1e-3)) - float(step(-1e-3))) / 2e-3
    assert slope == pytest.approx(sum(float((own[p] * direction[p]).sum()) for p in own), rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels in few bits


def kernel(inputs=192, outputs=96):
    return jnp.asarray(np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)) / 8


@pytest.mark.parametrize("inputs", [192, 48])
def test_a_dequantised_kernel_is_near(inputs):
    pytest.importorskip("qwix")
    w = kernel(inputs)
    eight = quant.quantize(w, "int8")
    steps = np.abs(w).max(0) / 127
    assert (np.abs(quant.dequantize(eight) - w) <= steps / 2 * 1.01).all()
    four = quant.quantize(w, "nf4")
    block = {192: 64, 48: 16}[inputs]
    assert four.scale.shape == (inputs // block, 96)
    largest = np.abs(np.asarray(w)).reshape(-1, block, 96).max(1).repeat(block, 0)
    # The widest gap between two levels of NF4 is 0.304 (from -1 to -0.696) of a block's largest number.
    assert (np.abs(quant.dequantize(four) - w) <= 0.153 * largest).all()
    assert np.square(quant.dequantize(four) - w).mean() < 0.012 * np.square(w).mean()
    assert (eight.qvalue.dtype, four.qvalue.dtype) == (jnp.int8, jnp.uint4)
    assert eight.qvalue.nbytes + eight.scale.nbytes < 0.28 * w.nbytes


@pytest.mark.parametrize("kind", quant.KINDS)
def test_a_model_runs_on_quantised_kernels(kind):
    pytest.importorskip("qwix")
    params, _ = adapted()
    base, low = lora.split(params)
    small = P.merge(lora.quantized(base, low, kind), low)
    taken = [path for path, leaf in P.flatten(small).items() if quant.is_quantized(leaf)]
    assert taken == [path.removesuffix(lora.A) + "kernel" for path in P.flatten(low) if path.endswith(lora.A)]
    by_hand = {p: quant.dequantize(x) if quant.is_quantized(x) else x for p, x in P.flatten(small).items()}
    got = logits(small)
    scale = np.abs(got).max()
    np.testing.assert_allclose(got, logits(P.unflatten(by_hand)), atol=2e-5 * scale)
    np.testing.assert_allclose(got, logits(lora.merge(small)), atol=2e-5 * scale)
    assert 1e-4 * scale < np.abs(got - logits(params)).max() < {"int8": 0.2, "nf4": 1.0}[kind] * scale


def test_a_scanned_stack_is_not_quantised():
    pytest.importorskip("qwix")
    params, _ = adapted(Lora(targets=("llm/**/q",)), scan=True)
    with pytest.raises(ValueError, match=r"lora.base='nf4': llm/layers/attn/q/kernel is a scanned stack.*scan='no'"):
        lora.quantized(*lora.split(params), "nf4")
