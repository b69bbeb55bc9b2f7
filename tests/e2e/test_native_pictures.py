"""Answers about pictures of many shapes: how few programs they take; sharded rows."""

import functools

import jax
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax.infer import generate as G
from lvlm_jax.infer.generate import Generator
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn.linear import abstract
from tests import tiny
from tests.parity.qwen_vl_tiny import CASES, make, packed


@functools.cache
def tools(case):
    return make(case)[1:]


def test_no_program_is_compiled_inside_a_bucket():
    """Nine shapes and numbers of pictures: as many programs as buckets of rows, lengths and patches."""
    module, params, spec = tools("qwen2_5_vl")
    generator = Generator(module, params, spec=spec, rows=2)
    shapes = [[(24, 16)], [(16, 24)], [(24, 20)], [(17, 30)], [(8, 8)], [(8, 8), (5, 5)], [(40, 16)], [(30, 17)]]
    shapes.append([(9, 40)])
    [prompts], _ = packed("qwen2_5_vl", spec, [[[3, *shape, 2] for shape in shapes]], vision_rows=12)
    before, buckets = G.prefill._cache_size(), set()
    for prompt in prompts:
        batch = generator.batch_of([prompt], 1)
        buckets.add((batch.tokens.shape, batch.patches.shape))
        list(generator.tokens(batch, 2, G.Sampling()))
    assert G.prefill._cache_size() - before == len(buckets) < len(shapes) / 2


ROWS = [[[3, (24, 16), 4]], [[5]], [[2, (17, 30), 1, (8, 8), 3]], [[1, (3, 32, 8), 4]]] * 2


@pytest.mark.parametrize("case", ["qwen2_5_vl", pytest.param("qwen2_vl", marks=pytest.mark.nightly), "qwen3_vl"])
def test_sharded_equals_unsharded(case):
    module, params, spec = tools(case)
    _, batch = packed(case, spec, ROWS, groups=8, vision_rows=2, length=40)

    def loss(params, model, batch):
        scores = jax.nn.log_softmax(model.apply({"params": params}, batch, method=tiny.logits))
        return -(scores[:, :-1].max(-1) * batch.weights[:, 1:]).sum()

    plain = tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, module, batch)
    model, mesh = LVLM(module.config, scan=True), M.make_mesh("FSDP_TP")
    shapes, axes = abstract(model, dummy_batch(model.config))
    placed = jax.device_put(P.stack_layers(params), M.shardings(mesh, axes, shapes))
    with M.use(mesh):
        given = jax.device_put(batch, M.batch_sharding(mesh))
        got = tiny.jit(jax.value_and_grad(loss), static_argnums=1)(placed, model, given)
    np.testing.assert_allclose(got[0], plain[0], rtol=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain[1]))
    close = functools.partial(np.testing.assert_allclose, atol=5e-6 * largest)
    jax.tree.map(close, P.unstack_layers(jax.device_get(got[1])), jax.device_get(plain[1]))


def test_prefill_and_decode_equal_the_full_pass():
    module, params, spec = tools("qwen3_vl")
    assert set(CASES) >= {"qwen3_vl"}
    [prompts], _ = packed("qwen3_vl", spec, [[[2, (24, 16), 9]]])
    generator = Generator(module, params, spec=spec)
    batch = generator.batch_of(prompts, 1)
    full = np.asarray(tiny.jit(lambda p, b: module.apply({"params": p}, b, method=tiny.logits))(params, batch))
    length, at = batch.tokens.shape[1], batch.tokens.shape[1] - 4
    text = ("tokens", "weights", "positions", "segments", "image_index", "axes")
    first = batch.replace(**{name: getattr(batch, name)[:, :at] for name in text})

    @tiny.jit
    def prefill(params, batch):
        cache = module.apply({}, 1, length, method="new_cache")
        return module.apply({"params": params}, batch, cache)[1]

    @tiny.jit
    def step(params, tokens, positions, start, cache, index):
        run = functools.partial(module.apply, {"params": params})
        hidden, cache = run(tokens, positions, start, cache, index, method="decode")
        return run(hidden, method="logits"), cache

    cache = prefill(params, first)
    start = np.asarray((batch.segments == 0).sum(1), np.int32)
    for width in (1, 2, 1):
        new = slice(at, at + width)
        got, cache = step(params, batch.tokens[:, new], batch.positions[:, new], start, cache, np.int32(at))
        tiny.close(got, full[:, new], full)
        at += width
