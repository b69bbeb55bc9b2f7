"""Plain ViT, DINOv2, BLIP-2's tower: pooled vectors, classes, hidden layers, masks, pictures of other sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lvlm_jax import vision
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision.vit import VisionTower, patchify
from tests import tiny
from tests.parity import compare

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}


def pictures(rows=28, cols=28):
    return np.random.default_rng(0).normal(size=(3, rows, cols, 3)).astype(np.float32)


def torched(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def load(model, folder, prefix=""):
    """Our tower with their weights, as they stand in a file: in memory they are named otherwise."""
    model.save_pretrained(folder)
    config = vision.FAMILIES[model.config.model_type].from_hf(model.config.to_dict())
    family = vision.FAMILIES[vision.family_of(config)]
    tower = VisionTower(config)
    shapes, _ = abstract(tower, *patchify(jnp.asarray(pictures()), 7))
    return tower, compare.load(family.rows(config, "", prefix), load_file(folder / "model.safetensors"), shapes)


def runner(tower, images, **kwargs):
    """A function of the parameters, compiled once."""
    args = patchify(jnp.asarray(images), 7)
    return tiny.jit(lambda p: tower.apply({"params": p}, *args, **kwargs))


def run(tower, params, images, **kwargs):
    return runner(tower, images, **kwargs)(params)


def test_vit(tmp_path):
    torch.manual_seed(0)
    model = compare.perturb(ViTModel(ViTConfig(**SIZES, intermediate_size=64)))
    tower, params = load(model, tmp_path)
    assert tower.config.norm_eps == 1e-12
    with torch.no_grad():
        out = model(torched(pictures()), output_hidden_states=True)
    last, pooled = run(tower, params, pictures())
    compare.close(last, out.last_hidden_state, "ViT last layer")
    compare.close(pooled, out.pooler_output, "ViT pooled")
    compare.close(run(tower, params, pictures(), method="features"), out.hidden_states[-2][:, 1:], "ViT penultimate")
    # A key's bias shifts all scores of a query alike; the pooled vector is the class token's.
    whole = runner(tower, pictures())
    dead = compare.dead(lambda p: whole(p)[1], params)
    assert {path for path in dead if not path.endswith("k/bias")} == set()


def test_vit_with_a_classifier(tmp_path):
    torch.manual_seed(0)
    model = compare.perturb(ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=64, num_labels=5)))
    tower, params = load(model, tmp_path, "vit.")
    assert tower.config.classes == 5
    out = model(torched(pictures()))
    out.logits.square().sum().backward()
    args = patchify(jnp.asarray(pictures()), 7)

    def scores(params):
        pooled = tower.apply({"params": params}, *args)[1]
        return tower.apply({"params": params}, pooled, method="logits")

    compare.close(tiny.jit(scores)(params), out.logits, "ViT classes")
    grads = tiny.jit(jax.grad(lambda p: jnp.square(scores(p)).sum()))(params)
    compare.close(
        grads["trunk"]["patch_embed"]["bias"], model.vit.embeddings.patch_embeddings.projection.bias.grad, "d patch"
    )
    theirs = model.vit.layers[0].mlp.fc1.weight.grad.T
    compare.close(grads["trunk"]["layers"]["0"]["mlp"]["up"]["kernel"], theirs, "d feed-forward")


DINO = [
    pytest.param(Dinov2Model, Dinov2Config, {}, id="dinov2"),
    pytest.param(Dinov2Model, Dinov2Config, {"use_swiglu_ffn": True, "use_mask_token": False}, id="gated"),
    pytest.param(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"num_register_tokens": 3}, id="registers"),
]


@pytest.mark.parametrize(("cls", "config", "change"), DINO)
def test_dinov2(cls, config, change, tmp_path):
    """At the table's own size, and at one that is lower and wider."""
    torch.manual_seed(0)
    model = compare.perturb(cls(config(**SIZES, **change)))
    tower, params = load(model, tmp_path)
    for rows, cols in ((28, 28), (21, 49)):
        images = pictures(rows, cols)
        with torch.no_grad():
            out = model(torched(images), output_hidden_states=True)
        last, pooled = run(tower, params, images)
        compare.close(last, out.last_hidden_state, f"{cls.__name__} at {rows} x {cols}, last layer")
        compare.close(pooled, out.pooler_output, f"{cls.__name__} at {rows} x {cols}, pooled")
    features = run(tower, params, images, method="features")
    first = 1 + tower.config.registers
    compare.close(features, out.hidden_states[-2][:, first:], f"{cls.__name__} penultimate")
    whole = runner(tower, images)
    dead = compare.dead(lambda p: whole(p)[0], params)
    assert {path for path in dead if not path.endswith(("k/bias", "mask_embed"))} == set()


def test_dinov2_with_hidden_patches(tmp_path):
    torch.manual_seed(0)
    model = compare.perturb(Dinov2Model(Dinov2Config(**SIZES)))
    with torch.no_grad():
        model.embeddings.mask_token.normal_()
    tower, params = load(model, tmp_path)
    masked = np.random.default_rng(1).random((3, 16)) < 0.4
    with torch.no_grad():
        out = model(torched(pictures()), bool_masked_pos=torch.tensor(masked))
    compare.close(
        run(tower, params, pictures(), masked=jnp.asarray(masked))[0], out.last_hidden_state, "DINOv2, masked"
    )


@pytest.mark.slow
def test_blip2(tmp_path):
    """What a Q-Former reads, and pictures of another size than the table's, as the public class interpolates them."""
    torch.manual_seed(0)
    # The class's own spread of initial weights, 1e-10, leaves nothing to compare.
    model = compare.perturb(Blip2VisionModel(Blip2VisionConfig(**SIZES, intermediate_size=64, initializer_range=0.02)))
    tower, params = load(model, tmp_path)
    assert tower.config.features == 17
    with torch.no_grad():
        out = model(torched(pictures()), output_hidden_states=True)
        wide = model(torched(pictures(21, 49)), interpolate_pos_encoding=True)
    last, pooled = run(tower, params, pictures())
    compare.close(last, out.last_hidden_state, "BLIP-2 last layer")
    compare.close(pooled, out.pooler_output, "BLIP-2 pooled")
    compare.close(run(tower, params, pictures(), method="features"), out.last_hidden_state, "BLIP-2 features")
    change = {"feature_layer": -2, "feature_norm": False, "class_feature": False}
    earlier = VisionTower(dataclasses.replace(tower.config, **change))
    compare.close(run(earlier, params, pictures(), method="features"), out.hidden_states[-2][:, 1:], "penultimate")
    resized = VisionTower(dataclasses.replace(tower.config, resize="cubic"))
    compare.close(run(resized, params, pictures(21, 49))[0], wide.last_hidden_state, "BLIP-2 at 21 x 49")
    whole = runner(tower, pictures())
    dead = compare.dead(lambda p: whole(p)[0], params)
    assert {path for path in dead if not path.endswith("k/bias")} == set()
