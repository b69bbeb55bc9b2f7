"""Vision and text towers: several pictures in a row, patches in any order, another grid, configs we cannot run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import mesh as M
from lvlm_jax import params as P
from lvlm_jax import vision
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import blip2_vit, clip, dinov2, eva, nfnet, plain_vit, siglip, siglip2, timm
from lvlm_jax.vision.text_tower import TextTower, TextTowerConfig
from lvlm_jax.vision.vit import VisionTower, ViTConfig, patchify
from lvlm_jax.zoo import llava
from tests import tiny

PICTURES = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)


def tower(config):
    module = VisionTower(config)
    shapes, _ = abstract(module, *patchify(jnp.asarray(PICTURES), 7))
    return module, tiny.randomize(shapes)


def run(module, params, *args, method="features"):
    return np.asarray(tiny.jit(lambda p, a: module.apply({"params": p}, *a, method=method))(params, args))


def test_patchify_cuts_rows_columns_channels():
    patches, positions, segments = patchify(jnp.asarray(PICTURES), 7)
    for n in range(2):
        np.testing.assert_array_equal(patches[n], tiny.cut(PICTURES[n], 7))
    assert positions[1, 6].tolist() == [1, 2]
    assert (np.asarray(segments) == 1).all()
    with pytest.raises(ValueError, match="28x28 does not divide into patches of 5"):
        patchify(jnp.asarray(PICTURES), 5)


def test_two_pictures_in_one_row_do_not_see_each_other():
    module, params = tower(tiny.SIGLIP)
    patches, positions, segments = patchify(jnp.asarray(PICTURES), 7)
    alone = run(module, params, patches, positions, segments)
    row = [jnp.concatenate([x[:1], x[1:]], axis=1) for x in (patches, positions)]
    shared = jnp.concatenate([segments[:1], segments[1:] * 2], axis=1)
    together = run(module, params, *row, shared)
    np.testing.assert_allclose(together[0], np.concatenate([alone[0], alone[1]]), atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [tiny.CLIP, tiny.SIGLIP, tiny.SIGLIP2, tiny.DINOV2, pytest.param(tiny.EVA02, marks=pytest.mark.slow)],
)
def test_patches_may_come_in_any_order_and_padding_is_not_read(config):
    module, params = tower(config)
    patches, positions, segments = patchify(jnp.asarray(PICTURES), 7)
    base = run(module, params, patches, positions, segments)
    order = np.random.default_rng(1).permutation(16)
    moved = run(module, params, patches[:, order], positions[:, order], segments)
    np.testing.assert_allclose(moved, base[:, order], atol=2e-5)
    pad = lambda x, value: jnp.concatenate([x, jnp.full_like(x[:, :3], value)], axis=1)  # noqa: E731
    padded = run(module, params, pad(patches, 9.0), pad(positions, 0), pad(segments, 0))
    np.testing.assert_allclose(padded[:, :16], base, atol=2e-5)


def test_the_pooled_vector_does_not_read_padding():
    module, params = tower(tiny.SIGLIP2)
    args = patchify(jnp.asarray(PICTURES), 7)
    pooled = lambda *args: run(module, params, *args, method=lambda m, *a: m(*a)[1])  # noqa: E731
    more = [jnp.concatenate([x, jnp.full_like(x[:, :3], value)], axis=1) for x, value in zip(args, (9.0, 0, 0))]
    np.testing.assert_allclose(pooled(*more), pooled(*args), atol=2e-5)
    # A row of padding alone, which fills up a batch, stays finite for a loss that weighs it with zero.
    nothing = pooled(args[0], args[1], jnp.zeros_like(args[2]))
    assert np.isfinite(nothing).all()
    assert (np.linalg.norm(nothing, axis=-1) > 0).all()


def test_registers_and_class_token_are_no_features():
    module, params = tower(tiny.DINOV2)
    args = patchify(jnp.asarray(PICTURES), 7)
    kept = run(VisionTower(dataclasses.replace(tiny.DINOV2, class_feature=True)), params, *args)
    whole = run(module, params, *args, method=lambda m, *a: m.trunk(*a, take=2))
    assert whole.shape == (2, 1 + 3 + 16, 32)
    np.testing.assert_array_equal(kept, np.delete(whole, [1, 2, 3], axis=1))
    np.testing.assert_array_equal(run(module, params, *args), whole[:, 4:])


@pytest.mark.parametrize(
    ("name", "preset"), [("DINOV2", "FSDP_TP"), pytest.param("VIT", "FSDP", marks=pytest.mark.slow)]
)
def test_sharded_and_scanned_equal_neither(name, preset):
    """Loss and gradients on 8 devices; scanned, as a pod runs it."""
    config, images = getattr(tiny, name), np.random.default_rng(0).normal(size=(8, 28, 28, 3)).astype(np.float32)
    args, mesh = patchify(jnp.asarray(images), 7), M.make_mesh(preset)

    def loss(params, module, args):
        last, pooled = module.apply({"params": params}, *args)
        scores = module.apply({"params": params}, pooled, method="logits") if module.config.classes else pooled
        return jnp.square(scores).mean() + jnp.abs(last).mean()

    module, params = tower(config)
    value, grads = tiny.jit(jax.value_and_grad(loss), static_argnums=1)(params, module, args)
    scanned = VisionTower(config, scan=True)
    shapes, axes = abstract(scanned, *args)
    cut = M.shardings(mesh, axes, shapes)
    step = tiny.jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, cut))
    with M.use(mesh):
        got = step(jax.device_put(P.stack_layers(params), cut), scanned, jax.device_put(args, M.batch_sharding(mesh)))
    np.testing.assert_allclose(got[0], value, rtol=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6 * largest)  # noqa: E731
    jax.tree.map(close, P.unstack_layers(got[1]), grads)


def test_feature_layer_and_class_token():
    module, params = tower(tiny.CLIP)
    args = patchify(jnp.asarray(PICTURES), 7)
    for layer in (-1, -2, -3, -4):
        kept = VisionTower(dataclasses.replace(tiny.CLIP, feature_layer=layer, class_feature=True))
        dropped = VisionTower(dataclasses.replace(tiny.CLIP, feature_layer=layer))
        whole = run(kept, params, *args)
        assert whole.shape == (2, 17, 32) == (2, kept.config.features, 32)
        np.testing.assert_array_equal(run(dropped, params, *args), whole[:, 1:])
    # Layer 0 is what goes into the first block: all blocks zeroed, every layer is it.
    flat = {k: np.zeros_like(v) if "layers/" in k else v for k, v in P.flatten(params).items()}
    np.testing.assert_allclose(run(module, P.unflatten(flat), *args), whole[:, 1:], atol=1e-6)


def test_text_longer_than_its_table_is_an_error():
    config = TextTowerConfig(vocab=9, width=8, depth=1, heads=2, mlp_dim=8, context=4)
    with pytest.raises(ValueError, match="5 tokens, but this text tower has 4 positions"):
        abstract(TextTower(config), jnp.zeros((1, 5), jnp.int32))


@pytest.mark.parametrize("family", [clip, siglip, siglip2, plain_vit, dinov2, blip2_vit])
def test_presets_go_out_and_come_back(family):
    for config in family.PRESETS.values():
        assert family.from_hf(family.to_hf(config)) == config
        assert vision.FAMILIES[vision.family_of(config)] is family
    assert set(family.HUB_NAMES.values()) == set(family.PRESETS)
    for text in getattr(family, "TEXT_PRESETS", {}).values():
        assert family.text_from_hf(family.text_to_hf(text)) == text
        # SigLIP 2's text tower is SigLIP's.
        assert vision.TEXT_FAMILIES[vision.text_family_of(text)] is (siglip if family is siglip2 else family)


@pytest.mark.parametrize("family", [eva, nfnet])
def test_timms_presets_go_out_and_come_back(family):
    assert set(family.HUB_NAMES.values()) == set(family.PRESETS)
    for name, preset in family.HUB_NAMES.items():
        config = family.PRESETS[preset]
        assert timm.from_config(timm.to_config(config)) == config
        assert vision.FAMILIES[vision.family_of(config)] is timm
        assert timm.from_hf(timm.to_hf(config)) == config
        # A release's config.json names its architecture and the width of its head.
        public = {"architecture": name.split("/")[1], "num_classes": config.classes}
        assert timm.from_config(public) == config


@pytest.mark.parametrize(
    "config",
    [
        tiny.EVA02,
        dataclasses.replace(
            tiny.EVA02, rotary_grid=None, resize="cubic_antialias", feature_layer=-1, feature_norm=True
        ),
        dataclasses.replace(tiny.NFNET, feature_layer=-1),
        dataclasses.replace(tiny.NFNET, **nfnet.AUTHORS),
    ],
)
def test_a_llava_on_timms_towers_goes_out_and_comes_back(config):
    whole = dataclasses.replace(tiny.SYSTEMS["llava15"], vision=config)
    public = llava.to_hf(whole, 98)
    assert public["model_type"] == llava.OWN_TYPE
    assert llava.from_hf(json.loads(json.dumps(public))) == (whole, 98)
    keys = [row.theirs for row in llava.rows(whole, "hf-5") if row.leaves[0].startswith("vision/")]
    assert {key.split(".")[0] for key in keys} == {"vision_tower"}


@pytest.mark.parametrize("config", [tiny.CLIP, tiny.SIGLIP, tiny.VIT, tiny.DINOV2])
def test_a_family_of_each_kind_of_tower(config):
    config = dataclasses.replace(config, mlp_dim=88) if config.gated else config
    family = vision.FAMILIES[vision.family_of(config)]
    assert family.from_hf(family.to_hf(config)) == config


def test_what_a_config_leaves_out_is_what_the_public_class_assumes():
    # The vision part of the hub's LLaVA-1.5-7B, whole.
    public = {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    }
    assert clip.from_hf(public) == clip.PRESETS["clip_l14_336"]
    assert clip.from_hf(public | {"image_size": [336, 336]}) == clip.PRESETS["clip_l14_336"]


@pytest.mark.parametrize(
    ("read", "change", "message"),
    [
        (clip.from_hf, {"hidden_act": "mish"}, r"hidden_act is 'mish'.*supported: 'quick_gelu', 'gelu'"),
        (clip.from_hf, {"num_channels": 1}, r"num_channels is 1.*supported: 3"),
        (clip.from_hf, {"image_size": [224, 336]}, r"image_size is \[224, 336\].*one side of a square"),
        (clip.text_from_hf, {"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\].*supported: one id"),
        (siglip.from_hf, {"hidden_act": "mish"}, r"hidden_act is 'mish'"),
        (siglip2.from_hf, {"num_patches": 200}, r"num_patches is 200.*the square of a side"),
        (plain_vit.from_hf, {"qkv_bias": False}, r"qkv_bias is False.*supported: True"),
        (plain_vit.from_hf, {"pooler_act": "relu"}, r"pooler_act is 'relu'.*supported: 'tanh'"),
        (
            plain_vit.from_hf,
            {"architectures": ["ViTForMaskedImageModeling"]},
            r"architectures is 'ViTForMasked.*'ViTModel'",
        ),
        (timm.from_config, {"architecture": "resnet50.a1_in1k"}, r"architecture is 'resnet50'.*vit_SIZE_patchP_R"),
        (
            timm.from_config,
            {"architecture": "vit_base_patch16_224", "global_pool": "avg"},
            r"global_pool is 'avg'.*supported: 'token', 'map'",
        ),
        (
            timm.from_config,
            {"architecture": "vit_base_patch16_224", "model_args": {"init_values": 1e-5}},
            r"model_args field is 'init_values'.*'img_size'",
        ),
        (
            timm.from_config,
            {"architecture": "eva02_large_patch14_448.mim"},
            r"'eva02_large_patch14_448'.*patch14_clip_224",
        ),
        (
            timm.from_config,
            {"architecture": "eva_giant_patch14_clip_224", "global_pool": "avg"},
            r"global_pool is 'avg'.*supported: 'token'",
        ),
        (
            timm.from_config,
            {"architecture": "eva02_base_patch16_clip_224", "model_args": {"scale_mlp": False}},
            r"scale_mlp is False.*supported: True",
        ),
        (
            timm.from_config,
            {"architecture": "dm_nfnet_f0", "model_args": {"act_layer": "relu"}},
            r"act_layer is 'relu'.*supported: 'gelu', 'silu'",
        ),
        (nfnet.from_hf, {"image_size": 64}, r"a lvlm_jax_nfnet lacks depths, widths"),
        (blip2_vit.from_hf, {"qkv_bias": False}, r"qkv_bias is False.*supported: True"),
        (dinov2.from_hf, {"mlp_ratio": 3}, r"mlp_ratio is 3.*supported: 4"),
        (dinov2.from_hf, {"architectures": ["Dinov2Backbone"]}, r"architectures is 'Dinov2Backbone'.*'Dinov2Model'"),
    ],
)
def test_what_we_cannot_run_is_an_error(read, change, message):
    with pytest.raises(ValueError, match=message):
        read(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rotary_grid": 4, "heads": 16},
            r"rotary_grid=4 .*a head has 2 values \(width=32, heads=16\), no multiple of 4",
        ),
        ({"inner_norm": True}, r"inner_norm=True stands inside a gated feed-forward, but gated is False"),
        ({"class_token": False}, r"pool='token' reads the class token, but class_token is False"),
        (
            {"max_patches": 9},
            r"max_patches=9 is for pictures of other grids than the table's, but resize='none'.*4 x 4",
        ),
    ],
)
def test_fields_that_contradict_each_other(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.VIT, **change)


def test_timms_names():
    config = timm.from_config({"architecture": "vit_base_patch16_224.augreg_in21k", "num_classes": 21843})
    vit = dataclasses.replace(plain_vit.PRESETS["vit_b16_224"], norm_eps=1e-6, classes=21843)
    assert config == vit == timm.from_config(timm.to_config(config))
    with pytest.raises(ValueError, match=r"VisionTransformer, Eva and NormFreeNet, .*cannot hold this tower"):
        timm.to_config(tiny.DINOV2)


def test_a_tower_no_public_class_holds():
    odd = ViTConfig(image_size=28, patch_size=7, width=8, depth=1, heads=2, mlp_dim=8, pre_norm=False)
    with pytest.raises(ValueError, match=r"no public family .*class_token=True, pre_norm=False"):
        vision.family_of(odd)
    text = dataclasses.replace(clip.TEXT_PRESETS["clip_b32"], causal=False)
    with pytest.raises(ValueError, match=r"no public family .*causal=False, pool='argmax'"):
        vision.text_family_of(text)
