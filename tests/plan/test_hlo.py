"""What is read off a compiled program's text, against programs whose work is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as meshes
from lvlm_jax.llm.decoder import Decoder
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.linear import abstract
from lvlm_jax.plan import hlo
from tests import tiny


def _text(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def test_loops_count_as_often_as_they_run():
    x, w = jnp.ones((64, 32)), jnp.ones((7, 32, 32))
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    work = hlo.read(_text(lambda x, w: jax.lax.scan(step, x, w)[0], x, w))
    assert work.flops == 7 * 2 * 64 * 32 * 32


def test_scanned_layers_count_as_layers_one_by_one():
    """By XLA's own count, which is right where there is no loop: what a second layer adds, norms and softmax too."""
    config = dataclasses.replace(tiny.LLAMA, width=256, head_dim=64, kv_heads=4, mlp_dim=1024)
    x, positions, ranges = jnp.ones((4, 64, 256)), jnp.zeros((4, 64), jnp.int32), R.causal(4, 64)

    def compiled(depth, scan):
        decoder = Decoder(dataclasses.replace(config, depth=depth), scan=scan)
        shapes, _ = abstract(decoder, x, positions, ranges)
        loss = lambda params, x: decoder.apply({"params": params}, x, positions, ranges)[0].sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shapes, x).compile()

    one, two, scanned = compiled(1, False), compiled(2, False), compiled(7, True)
    layer = two.cost_analysis()["flops"] - one.cost_analysis()["flops"]
    assert hlo.read(two.as_text()).flops - hlo.read(one.as_text()).flops == pytest.approx(layer, rel=0.02)
    assert hlo.read(scanned.as_text()).flops == pytest.approx(7 * layer, rel=0.02)


def test_batched_products_count_once_a_batch():
    a, b = jnp.ones((5, 64, 32)), jnp.ones((5, 32, 16))
    assert hlo.read(_text(jnp.matmul, a, b)).flops == 5 * 2 * 64 * 32 * 16


def test_exchanges_of_a_sharded_product():
    mesh = meshes.make_mesh("FSDP")
    at = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # noqa: E731
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=at("fsdp"))
    w = jax.ShapeDtypeStruct((32, 128), jnp.float32, sharding=at(None, None))
    work = hlo.read(_text(lambda x, w: (x @ w).sum(0), x, w))
    (one,) = work.collectives
    assert (one.kind, one.count, one.bytes) == ("all-reduce", 1, 128 * 4)
    assert sorted(i for group in one.groups for i in group) == list(range(8))
    assert work.flops == 2 * 64 * 32 * 128 / 8


CONVOLUTION = """
ENTRY %main (a: bf16[{a}], b: bf16[{b}]) -> bf16[{out}] {{
  %a = bf16[{a}]{{2,1,0}} parameter(0)
  %b = bf16[{b}]{{2,1,0}} parameter(1)
  ROOT %c = bf16[{out}]{{2,1,0}} convolution(%a, %b), {rest}
}}
"""


@pytest.mark.parametrize(
    ("a", "b", "out", "rest", "flops"),
    [
        # x[2, 576, 64] @ w[64, 32], as the TPU compiler writes it
        ("2,576,64", "64,32,1", "2,576,32", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 2 * 576 * 64 * 32),
        # a batched product: the batch is an axis of the window, and only its diagonal meets anything
        (
            "5,64,32",
            "5,32,16",
            "5,64,16",
            "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            5 * 2 * 64 * 32 * 16,
        ),
    ],
)
def test_products_written_as_convolutions(a, b, out, rest, flops):
    assert hlo.read(CONVOLUTION.format(a=a, b=b, out=out, rest=rest)).flops == flops


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'data'}", ((0, 2), (1, 3))),
    ],
)
def test_who_exchanges_with_whom(text, groups):
    assert hlo._groups(text) == groups


def test_a_loop_of_unknown_length_is_an_error():
    run = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="does not say how often it runs"):
        hlo.read(_text(run, jnp.ones((4, 4))))


LOOP = """
%cond (p: (u32[], f32[4,4])) -> pred[] {
  %bound = u32[] constant(8)
  %p = (u32[], f32[4,4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %more = pred[] compare(%i, %bound), direction=LT
}

%body (p: (u32[], f32[4,4])) -> (u32[], f32[4,4]) {
  %turns = u32[] constant(2)
  %p = (u32[], f32[4,4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[4,4] get-tuple-element(%p), index=1
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[4,4] dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next = u32[] add(%i, %turns)
  ROOT %out = (u32[], f32[4,4]) tuple(%next, %z)
}

ENTRY %main (x: f32[4,4]) -> (u32[], f32[4,4]) {
  %zero = u32[] constant(0)
  %x = f32[4,4] parameter(0)
  %start = (u32[], f32[4,4]) tuple(%zero, %x)
  ROOT %loop = (u32[], f32[4,4]) while(%start), condition=%cond, body=%body
}
"""


def test_a_loop_whose_body_runs_two_turns_at_once():
    """As the TPU compiler writes products whose weights travel around a ring."""
    assert hlo.read(LOOP).flops == 8 * 2 * 4**3


BETWEEN = """
ENTRY %main (a: bf16[8,128], t: token[]) -> token[] {
  %a = bf16[8,128]{1,0} parameter(0)
  %t = token[] parameter(1)
  %s = (bf16[8,128]{1,0}, u32[], token[]) send(%a, %t), channel_id=2, frontend_attributes={_KIND}
  ROOT %d = token[] send-done(%s), channel_id=2
}
"""


def test_what_goes_to_other_slices():
    work = hlo.read(BETWEEN.replace("_KIND", '_xla_megascale_transfer_type="ALL_REDUCE"'))
    (one,) = work.between
    assert (one.kind, one.count, one.bytes, work.collectives) == ("all-reduce", 1, 8 * 128 * 2, ())
    assert hlo.read(BETWEEN.replace("_KIND", 'other="x"')).between == ()


def test_a_reduction_that_keeps_one_part_is_a_reduce_scatter():
    text = """
%all-reduce-scatter.1 (a: f32[64]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %d = f32[8]{0} dynamic-slice(%r), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[64]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = hlo.read(text).collectives
    assert (one.kind, one.bytes) == ("reduce-scatter", 256)


def test_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("nothing")


def test_an_asynchronous_exchange_counts_once():
    text = """
ENTRY %main (a: f32[8]) -> f32[64] {
  %a = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %d = f32[64]{0} all-gather-done(%s)
}
"""
    (one,) = hlo.read(text).collectives
    assert (one.kind, one.count, one.bytes) == ("all-gather", 1, 256)
    np.testing.assert_array_equal(one.groups, [range(8)])
