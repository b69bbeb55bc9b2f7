"""Stages with adapters, an average and other optimizers: what moves, what is kept, what it costs."""

import functools
import inspect
import json
import os
import signal
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lvlm_jax import mesh as meshes
from lvlm_jax import params as P
from lvlm_jax.checkpoint import Checkpoints, load_params
from lvlm_jax.nn import lora
from lvlm_jax.nn.linear import abstract, init, linear
from lvlm_jax.nn.lora import Lora
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.train.log import read_rows
from lvlm_jax.train.loop import IndexedBatches, Preempted, fit
from lvlm_jax.train.optim import OptimizerConfig, make_optimizer
from lvlm_jax.train.stages import Average, Stage
from lvlm_jax.train.step import init_state, make_train_step

LORA = Lora(targets=("layers/*/{up,down}",), rank=2, alpha=4.0)
STEPS = 8


class Block(nn.Module):
    """A residual layer of two products."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, _, *shared):
        wide = jnp.tanh(linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(x))
        return x + linear(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="down")(wide), None


class Net(nn.Module):
    """A stack of layers and a head."""

    hidden: int = 16
    depth: int = 2
    scan: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        block = functools.partial(Block, hidden=self.hidden, dtype=self.dtype)
        stack = make_stack(block, self.depth, self.scan, name="layers")
        return linear(4, ("embed", None), dtype=self.dtype, name="head")(run_stack(stack, self.depth, x)[0])


def loss_of(net):
    def loss_fn(params, batch):
        error = jnp.square(net.apply({"params": params}, batch["x"]).astype(jnp.float32) - batch["y"]).sum((1, 2))
        return error.sum(), jnp.float32(len(error)), {}

    return loss_fn


def batch(k, width=8, rows=16, length=2):
    random = np.random.default_rng(k)
    x = random.normal(size=(rows, length, width)).astype(np.float32)
    return {"x": x, "y": np.tanh(x[..., :4] * x[..., 1:5])}


def stage(**changes):
    values = {
        "name": "tune",
        "trains": (),
        "steps": STEPS,
        "optimizer": OptimizerConfig(learning_rate=3e-2, weight_decay=0.1, eps=1e-3),
        "lora": LORA,
        "average": Average(decay=0.8),
        "log_every": 1,
        "save_every": 3,
    }
    return Stage(**(values | changes))


def start(net, config=LORA, width=8):
    """(params with adapters, axes)."""
    x = jnp.zeros((1, 1, width))
    base = init(net, jax.random.key(0), x)
    shapes, axes = abstract(net, x)
    if config is None:
        return base, axes
    return lora.add(base, axes, config, jax.random.key(1)), lora.add_shapes(shapes, axes, config)[1]


def tune(workdir, net=None, params=None, hooks=(), mesh=None, axes=None, **changes):
    net = net or Net()
    params = start(net)[0] if params is None else params
    run = inspect.unwrap(fit) if isinstance(params, list) else fit  # the tests' type checker holds on to arguments
    return run(
        stage(**changes),
        loss_fn=loss_of(net),
        params=params.pop() if isinstance(params, list) else params,  # out of a list: nobody else holds them
        batches=IndexedBatches(batch),
        workdir=workdir,
        hooks=hooks,
        mesh=mesh,
        axes=axes,
    )


def cards(folder):
    return json.loads((folder / "manifest.json").read_text())["leaves"]


def everything(workdir):
    saved = Checkpoints(workdir / "tune" / "checkpoints")
    like = {p: jax.ShapeDtypeStruct(c["shape"], c["dtype"]) for p, c in cards(saved.folder / str(STEPS)).items()}
    rows = [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(workdir / "tune" / "metrics.jsonl")]
    return load_params(workdir / "tune" / "params"), saved.restore(STEPS, like=P.unflatten(like)), rows


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run with adapters and an average."""
    workdir = tmp_path_factory.mktemp("whole")
    seen = []

    def look(step, state, metrics):
        seen.append(jax.device_get(state.trained))

    return workdir, tune(workdir, hooks=(look,)), seen


def test_only_adapters_move_and_only_they_have_state(whole):
    workdir, after, _ = whole
    before = P.flatten(start(Net())[0])
    moved = sorted(path for path, leaf in P.flatten(after).items() if not np.array_equal(leaf, before[path]))
    assert moved == sorted(f"layers/{x}/{name}" for x in ("up", "down") for name in (lora.A, lora.B))
    state = cards(workdir / "tune" / "checkpoints" / str(STEPS))
    leaves = {path.rpartition("/")[2] for path in state if "/" in path and not path.endswith("count")}
    assert leaves == {lora.A, lora.B}
    params = cards(workdir / "tune" / "params")
    for path, card in params.items():  # the base is stored once, by reference
        assert card.get("folder") == (None if path.endswith((lora.A, lora.B)) else "../frozen"), path


def test_the_average_is_what_the_stage_hands_on(whole, tmp_path):
    _, after, seen = whole
    smooth = lora.split(start(Net())[0])[1]
    smooth = {p: np.asarray(x) for p, x in P.flatten(smooth).items() if not p.endswith(lora.SCALE)}
    for step in map(P.flatten, seen):
        smooth = {path: 0.8 * leaf + 0.2 * step[path] for path, leaf in smooth.items()}
    last = P.flatten(seen[-1])
    for path, leaf in smooth.items():
        np.testing.assert_allclose(P.flatten(after)[path], leaf, rtol=1e-5, atol=1e-7)
        assert np.abs(leaf - last[path]).max() > 1e-4
    other = P.flatten(tune(tmp_path, average=Average(decay=0.8, use=False)))
    kept = P.flatten(load_params(tmp_path / "tune" / "average"))
    for path in last:
        np.testing.assert_array_equal(other[path], last[path])
    for path, leaf in P.flatten(P.unstack_layers(after)).items():
        np.testing.assert_array_equal(kept[path], leaf)


def test_a_stop_and_a_resume_give_the_same_bits(whole, tmp_path):
    with pytest.raises(Preempted):
        tune(tmp_path, hooks=(lambda step, *_: step == 4 and os.kill(os.getpid(), signal.SIGTERM),))
    tune(tmp_path)
    for got, wanted in zip(everything(tmp_path), everything(whole[0])):
        equal(got, wanted)


@pytest.mark.parametrize("preset", [pytest.param("FSDP", marks=pytest.mark.slow), "FSDP_TP"])
def test_sharded_equals_unsharded(preset, whole, tmp_path):
    net, mesh, cut = Net(), meshes.make_mesh(preset), set()
    params, axes = start(net)
    lay = meshes.shardings(mesh, axes, params)

    def look(step, state, metrics):
        up = state.trained["layers"]["up"]
        cut.add((up[lora.A].sharding.spec, up[lora.B].sharding.spec))

    got = tune(tmp_path, params=jax.device_put(params, lay), mesh=mesh, axes=axes, hooks=(look,))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), got, whole[1])
    second = PartitionSpec(None, None, {"FSDP": None, "FSDP_TP": "tensor"}[preset])
    assert cut == {(PartitionSpec(None, "fsdp", None), second)}


def test_scanned_and_per_layer_train_alike(whole, tmp_path):
    got = tune(tmp_path, net=Net(scan=False), params=P.unstack_layers(start(Net())[0]))
    wanted = P.unstack_layers(whole[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), got, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def compiled(trains, config, merged=False, width=256):
    """The compiled step of a net of a few million weights, alternatives side by side."""
    net = Net(hidden=4 * width, depth=4)
    axes = abstract(net, jnp.zeros((1, 1, width)))[1]
    params = jax.eval_shape(lambda: init(net, jax.random.key(0), jnp.zeros((1, 1, width))))
    params = params if config is None else lora.add_shapes(params, axes, config)[0]
    values = stage(trains=trains, lora=config, average=None)
    trained, frozen = P.split(params, values.mask(params))
    tx = make_optimizer(values.optimizer, STEPS, trained)
    plain = loss_of(net)
    loss_fn = (lambda p, b: plain(_added(p), b)) if merged else plain
    rows = jax.eval_shape(lambda: {"x": jnp.zeros((8, 64, width)), "y": jnp.zeros((8, 64, 4))})
    state = jax.eval_shape(lambda t: init_state(t, tx), trained)
    return make_train_step(loss_fn, tx).lower(state, frozen, rows).compile()


def _added(params):
    """The other way to run adapters: added to their kernels in every forward pass."""
    flat = P.flatten(params)
    for path in [p for p in flat if p.endswith(lora.A)]:
        kernel = path.removesuffix(lora.A) + "kernel"
        a, b, scale = (flat.pop(lora.beside(kernel, name)) for name in lora.NAMES)
        flat[kernel] = flat[kernel] + scale[:, None, None] * (a @ b)
    return P.unflatten(flat)


def test_a_step_with_adapters_costs_less_than_a_full_one():
    full = compiled(("layers/**",), None)
    own, added = (compiled((), Lora(targets=("layers/**",), rank=8), merged) for merged in (False, True))
    flops = {name: step.cost_analysis()["flops"] for name, step in (("full", full), ("own", own), ("added", added))}
    memory = {
        name: step.memory_analysis().argument_size_in_bytes + step.memory_analysis().temp_size_in_bytes
        for name, step in (("full", full), ("own", own), ("added", added))
    }
    print({name: (flops[name] / flops["full"], memory[name] / memory["full"]) for name in flops})
    assert flops["own"] < 0.7 * flops["full"]
    assert flops["added"] > flops["full"]
    assert memory["own"] < 0.7 * memory["full"]
    assert memory["own"] < 0.85 * memory["added"]


# ---------------------------------------------------------------------------------------------------------------------
# Few bits, few moments, half floats


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_adapters_train_over_a_base_in_few_bits(base, tmp_path):
    pytest.importorskip("qwix")
    net, config = Net(hidden=128, scan=False), Lora(targets=("layers/*/{up,down}",), rank=4, base=base)
    params, _ = start(net, config, width=64)
    before = jax.tree.map(np.array, params)
    losses, held = [], {}

    after = fit(
        stage(lora=config, steps=30, save_every=0, optimizer=OptimizerConfig(learning_rate=1e-2)),
        loss_fn=loss_of(net),
        params=params,
        batches=IndexedBatches(lambda k: batch(k, 64)),
        workdir=tmp_path,
        hooks=(lambda step, state, metrics: losses.append(float(metrics["loss"])),),
    )
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    # The stage hands on the weights as they were given, not what a few bits left of them.
    equal(lora.split(jax.device_get(after))[0], lora.split(before)[0])
    small = lora.quantized(*lora.split(params), base)
    held = sum(x.nbytes for x in jax.tree.leaves(small["layers"]))
    full = sum(x.nbytes for x in jax.tree.leaves(lora.split(params)[0]["layers"]))
    assert held < 0.32 * full


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_base_in_few_bits_is_cut_over_the_mesh(base, tmp_path):
    pytest.importorskip("qwix")
    config = Lora(targets=("layers/*/{up,down}",), rank=2, base=base)
    net, mesh = Net(hidden=128, depth=1, scan=False), meshes.make_mesh("FSDP_TP")
    params, axes = start(net, config)
    options = {"net": net, "lora": config, "average": None, "steps": 2, "save_every": 0}
    whole = tune(tmp_path / "one", params=params, **options)
    lay = meshes.shardings(mesh, axes, params)
    handed = [jax.device_put(params, lay)]
    kernel, seen = weakref.ref(handed[0]["layers"]["0"]["up"]["kernel"]), []
    look = (lambda *_: seen.append(kernel()),)
    got = tune(tmp_path / "many", params=handed, mesh=mesh, axes=axes, hooks=look, **options)
    assert seen == [None, None], "the whole kernel left the devices"
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), got, whole)


def test_quantised_kernels_of_a_scanned_stack_name_the_way_out(tmp_path):
    pytest.importorskip("qwix")
    config = Lora(targets=("layers/*/up",), base="int8")
    with pytest.raises(ValueError, match=r"layers/up/kernel is a scanned stack.*set scan='no'"):
        tune(tmp_path, params=start(Net(), config)[0], lora=config)


def test_adafactor_keeps_rows_and_columns_and_learns(tmp_path):
    net, losses = Net(hidden=32), []
    config = OptimizerConfig(kind="adafactor", learning_rate=3e-2, factor_from=8)
    params, _ = start(net, None)
    options = {"trains": ("**",), "lora": None, "average": None, "optimizer": config, "steps": 30, "save_every": 0}
    tune(tmp_path, net, params, hooks=(lambda s, state, metrics: losses.append(float(metrics["loss"])),), **options)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    kept = cards(tmp_path / "tune" / "checkpoints" / "30")
    row = next(card for path, card in kept.items() if path.endswith("v_row/layers/0/up/kernel"))
    full = next(card for path, card in kept.items() if path.endswith("/v/layers/0/up/kernel"))
    assert (row["shape"], full["shape"]) == ([8], [])


def test_half_floats_give_the_gradients_of_full_ones():
    """Losses are summed before they are differentiated, so small gradients do not vanish in float16."""
    full, half = Net(), Net(dtype=jnp.float16)
    params = start(full)[0]
    params["layers"]["up"][lora.B] += 0.1
    pull = lambda net: jax.grad(lambda p: loss_of(net)(p, jax.tree.map(jnp.asarray, batch(0)))[0])(params)  # noqa: E731
    wanted, got = P.flatten(jax.jit(pull, static_argnums=0)(full)), P.flatten(jax.jit(pull, static_argnums=0)(half))
    for path, leaf in wanted.items():
        assert got[path].dtype == jnp.float32
        np.testing.assert_allclose(got[path], leaf, atol=2e-2 * np.abs(leaf).max())


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("trains", "says"),
    [
        (("layers/**",), r"takes layers/down/kernel \(2 in all\), which\s+stage.lora holds frozen"),
        (("**/lora_a",), "'\\*\\*/lora_a' matches nothing"),
    ],
)
def test_training_what_lies_under_an_adapter(trains, says):
    with pytest.raises(ValueError, match=says):
        stage(trains=trains).mask(start(Net())[0])


def test_a_tree_without_the_adapters_of_its_stage():
    with pytest.raises(ValueError, match=r"the tree has no adapters \(nn.lora.add\)"):
        stage().mask(start(Net(), None)[0])
    with pytest.raises(ValueError, match="is None, but the tree has adapters"):
        stage(lora=None, trains=("head/**",)).mask(start(Net())[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "adam"}, r"optimizer.kind='adam': choose one of \['adamw', 'adafactor'\]"),
        ({"kind": "adafactor", "b2": 0.98}, "optimizer.b2=0.98 is not read by kind='adafactor'"),
        ({"factor_from": 0}, "optimizer.factor_from=0"),
    ],
)
def test_bad_optimizers(change, says):
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(learning_rate=1e-3, **change)


def test_bad_averages():
    with pytest.raises(ValueError, match=r"average.decay=1.0: must lie between 0 and 1"):
        Average(decay=1.0)
