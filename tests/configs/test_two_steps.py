"""Two steps of each recipe that is too large to try: its stages, on a small model of the same kind, sharded.

The recipes that have a ``:tiny`` of their own run whole in the other files of this folder; Qwen-VL's, too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import assemble, recipe
from lvlm_jax import mesh as meshes
from lvlm_jax import params as P
from lvlm_jax.connectors import QFormerConfig
from lvlm_jax.models.lvlm import LVLM, dummy_batch
from lvlm_jax.nn import lora
from lvlm_jax.nn.linear import abstract
from lvlm_jax.train.loop import IndexedBatches, fit
from lvlm_jax.vision import NFNetConfig
from tests import tiny

I = tiny.IMAGE
ROWS = [[3, I, 4], [9], [2, I, 1, I, 5], [6, I, 3], [1, I, 8], [4], [7, I, 2], [2, I, 2]]
# In CI one of each kind, the others before a release.
STAGES = [
    ("cogvlm_pretrain", "caption"),
    ("cogvlm_sft", "instruct"),
    ("cogvlm_lora", "tune"),
    ("openflamingo_interleaved", "train"),
    ("openflamingo_interleaved:4b", "train"),
    ("idefics_interleaved", "train"),
    ("flamingo", "train"),
    ("llava15_align", "align"),
    ("llava15_align:perceiver", "align"),
    ("llava15_instruct", "instruct"),
    ("llava15_instruct:full", "instruct"),
    ("llavanext_instruct", "instruct"),
    ("llava_onevision_align", "align"),
    ("llava_onevision_mid", "mid"),
    ("llava_onevision_instruct", "single"),
    ("llava_onevision_instruct", "onevision"),
    ("minigpt4_align", "align"),
    ("minigpt4_align:llama2", "align"),
    ("minigpt4_instruct", "instruct"),
    ("minigpt_v2_instruct", "instruct"),
    ("videochat_align", "align"),
    ("videochat_instruct", "instruct"),
    ("nanovlm_222m", "train"),
    ("paligemma_finetune", "transfer"),
    ("qwen3_llava_small", "align"),
    ("qwen3_llava_small:gemma3_1b", "instruct"),
]
OFTEN = [STAGES[at] for at in (0, 5, 7, 13, 20, 25)]
WHEN = {True: pytest.mark.slow, False: pytest.mark.nightly}
FEWER = {"cogvlm_lora": ("vision/trunk/layers/1/mlp/**",)}
"""What trains where the small tower has no such layers."""


def small(config):
    """Every size made tiny, every kind of part kept."""
    if isinstance(config.vision, NFNetConfig):
        vision = dataclasses.replace(tiny.NFNET, feature_layer=config.vision.feature_layer)
    else:
        sizes = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
        sizes |= {"frames": 2, "global_blocks": 2} if config.vision.frames > 1 else {}
        sizes |= {"max_patches": 16} if config.vision.max_patches else {}
        vision = dataclasses.replace(config.vision, **sizes)
    fusion = config.fusion and dataclasses.replace(config.fusion, heads=4, head_dim=8, mlp_dim=64)
    depth = 2 * (fusion.every if fusion else 1)
    sizes = {"width": 32, "depth": depth, "heads": 4, "kv_heads": 4, "head_dim": None, "mlp_dim": 128}
    decoder = dataclasses.replace(config.llm, vocab=99, context=128, **sizes)
    between = {"hidden": 128, "latents": 4, "depth": 2, "heads": 4, "head_dim": 8}
    between = {name: size for name, size in between.items() if hasattr(config.connector, name)}
    if isinstance(config.connector, QFormerConfig):
        between |= {"width": 32, "queries": 4, "extra": 4 * bool(config.connector.extra), "mlp_dim": 64}
    connector = dataclasses.replace(config.connector, **between)
    return dataclasses.replace(config, vision=vision, connector=connector, llm=decoder, fusion=fusion)


def rows_of(frames):
    """The rows, each picture as often as a clip has frames."""
    return [[one for piece in row for one in [piece] * (frames if piece is I else 1)] for row in ROWS]


@pytest.mark.parametrize(("word", "name"), [pytest.param(*row, marks=WHEN[row in OFTEN]) for row in STAGES])
def test_two_steps(word, name, tmp_path):
    found = recipe.load(word)
    stage = found.stages[name]
    optimizer = dataclasses.replace(stage.optimizer, warmup=0)
    trains = FEWER.get(word, stage.trains)
    changes = {"steps": 2, "accumulate": 1, "start": {}, "save_every": 0, "optimizer": optimizer}
    stage = dataclasses.replace(stage, trains=trains, **changes)
    config, scan = small(found.model.lvlm), found.scan != "no"
    rows = rows_of(config.vision.frames)
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
        loss_fn=assemble.loss_of(stage, model, assemble.trains_head(mask), mesh),
        params=jax.device_put(params, meshes.shardings(mesh, axes, params)),
        batches=IndexedBatches(lambda k: tiny.batch(config, rows, groups=8, image_id=config.vocab - 1)[0]),
        workdir=tmp_path,
        mesh=mesh,
        axes=axes,
        hooks=(lambda step, state, metrics: losses.append(float(metrics["loss"])),),
    )
    assert np.isfinite(losses).all()
    before, after = P.flatten(params), P.flatten(after)
    moved = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    ends = ("vision/post_norm/",) if not getattr(config.vision, "feature_norm", True) else ()  # read by nobody
    assert moved == {path for path, hit in P.flatten(mask).items() if hit and not path.startswith(ends)}
