"""Two steps of recipes for systems too large to try: their stage, on a small model of the same kind, sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import assemble, recipe
from lvlm_jax import mesh as meshes
from lvlm_jax import params as P
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn import lora
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train.loop import IndexedBatches, fit
from lvlm_jax.vision import NFNetConfig
from tests import tiny

I = tiny.IMAGE
ROWS = [[3, I, 4], [9], [2, I, 1, I, 5], [6, I, 3], [1, I, 8], [4], [7, I, 2], [2, I, 2]]
STAGES = {
    "cogvlm_pretrain": "caption",
    "cogvlm_sft": "instruct",
    "cogvlm_lora": "tune",
    "openflamingo_interleaved": "train",
    "openflamingo_interleaved:4b": "train",
    "idefics_interleaved": "train",
    "flamingo": "train",
}
FEWER = {"cogvlm_lora": ("vision/trunk/layers/1/mlp/**",)}
"""What trains where the small tower has no such layers."""


def small(config):
    """Every size made tiny, every kind of part kept."""
    if isinstance(config.vision, NFNetConfig):
        vision = dataclasses.replace(tiny.NFNET, feature_layer=config.vision.feature_layer)
    else:
        sizes = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
        vision = dataclasses.replace(config.vision, **sizes)
    fusion = config.fusion and dataclasses.replace(config.fusion, heads=4, head_dim=8, mlp_dim=64)
    depth = 2 * (fusion.every if fusion else 1)
    sizes = {"width": 32, "depth": depth, "heads": 4, "kv_heads": 4, "head_dim": None, "mlp_dim": 128}
    decoder = dataclasses.replace(config.llm, vocab=99, context=128, **sizes)
    between = {"hidden": 128, "latents": 4, "depth": 2, "heads": 4, "head_dim": 8}
    between = {name: size for name, size in between.items() if hasattr(config.connector, name)}
    connector = dataclasses.replace(config.connector, **between)
    return dataclasses.replace(config, vision=vision, connector=connector, llm=decoder, fusion=fusion)


@pytest.mark.slow
@pytest.mark.parametrize("word", STAGES)
def test_two_steps(word, tmp_path):
    found, name = recipe.load(word), STAGES[word]
    stage = found.stages[name]
    optimizer = dataclasses.replace(stage.optimizer, warmup=0)
    trains = FEWER.get(word, stage.trains)
    stage = dataclasses.replace(stage, trains=trains, steps=2, start={}, save_every=0, optimizer=optimizer)
    config, scan = small(found.model.lvlm), found.scan != "no"
    model, mesh = LVLM(config, scan=scan, remat=found.remat), meshes.make_mesh("FSDP")
    params = jax.tree.map(jnp.asarray, tiny.weights(config))
    params = P.stack_layers(params) if scan else params
    axes = abstract(model, dummy_batch(config))[1]
    if stage.lora is not None:
        shapes, grown = lora.add_shapes(jax.eval_shape(lambda: params), axes, stage.lora)
        params, axes = lora.add(params, axes, stage.lora, jax.random.key(0)), grown
        assert P.flatten(shapes).keys() == P.flatten(params).keys()
    mask, losses = stage.stage(name).mask(params), []
    after = fit(
        stage.stage(name),
        loss_fn=assemble.loss_of(stage, model, assemble.trains_head(found, mask), mesh),
        params=jax.device_put(params, meshes.shardings(mesh, axes, params)),
        batches=IndexedBatches(lambda k: tiny.batch(config, ROWS, groups=8, image_id=config.vocab - 1)[0]),
        workdir=tmp_path,
        mesh=mesh,
        axes=axes,
        hooks=(lambda step, state, metrics: losses.append(float(metrics["loss"])),),
    )
    assert np.isfinite(losses).all()
    before, after = P.flatten(params), P.flatten(after)
    moved = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    assert moved == {path for path, hit in P.flatten(mask).items() if hit}
