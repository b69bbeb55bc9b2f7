"""CLIP: both towers, the joint space, both pooling rules, and the layer that a LLaVA reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from lvlm_jax.models.contrastive import DualEncoder
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import clip
from lvlm_jax.vision.vit import VisionTower, patchify
from lvlm_jax.zoo import dual
from tests.parity import compare

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 24,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 24,
}


def reference(eos: int, act: str = "quick_gelu"):
    torch.manual_seed(0)
    ids = {"eos_token_id": eos, "bos_token_id": 1, "pad_token_id": 0, "hidden_act": act}
    text, vision = TEXT | ids, VISION | {"hidden_act": act}
    return compare.perturb(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))


def pictures(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 28, 28, 3)).astype(np.float32)


def texts(eos: int) -> np.ndarray:
    """Three texts that end at different places, with a second end token, and larger ids behind the first."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 90, (3, 12)).astype(np.int32)
    tokens[0, 4], tokens[0, 9], tokens[1, 11], tokens[2, 2] = eos, eos, eos, eos
    return tokens


def load(model, config):
    module = DualEncoder(config)
    images = jnp.asarray(pictures(1))
    shapes, _ = abstract(
        module, images, jnp.zeros((1, 4), jnp.int32), method=lambda m, i, t: both(m, i, t, config.vision.patch_size)
    )
    return module, compare.load(dual.rows(config), compare.tensors(model, clip.UNUSED), shapes)


def both(module, images, tokens, patch):
    image, text = module.embed_images(*patchify(images, patch)), module.embed_text(tokens)
    bias = module.logit_bias if module.config.bias else 0.0
    return image, text, jnp.exp(module.logit_scale) * image @ text.T + bias


@pytest.mark.parametrize(("eos", "act"), [(2, "quick_gelu"), (50, "quick_gelu"), (50, "gelu")])
def test_joint_space(eos, act):
    model = reference(eos, act)
    config = dual.from_hf(model.config.to_dict())
    assert config.text.pool == ("argmax" if eos == 2 else "eos")
    module, params = load(model, config)
    images, tokens = pictures(), texts(eos)
    run = jax.jit(lambda p: module.apply({"params": p}, jnp.asarray(images), jnp.asarray(tokens), 7, method=both))
    image, text, scores = run(params)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
    compare.close(image, out.image_embeds, "CLIP image_embeds")
    compare.close(text, out.text_embeds, "CLIP text_embeds")
    compare.close(scores, out.logits_per_image, "CLIP logits")
    # The class token stands for its picture; the keys' bias shifts all scores of a query alike.
    unread = {path for path in compare.dead(lambda p: run(p)[2], params) if not path.endswith("k/bias")}
    assert unread == set()


def test_penultimate_layer_and_pooled_vector():
    torch.manual_seed(0)
    model = compare.perturb(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    config = clip.from_hf(model.config.to_dict())
    tower = VisionTower(config)
    args = patchify(jnp.asarray(pictures()), 7)
    shapes, _ = abstract(tower, *args)
    params = compare.load(clip.rows(config, "", ""), compare.tensors(model, clip.UNUSED), shapes)
    with torch.no_grad():
        out = model(torch.tensor(pictures().transpose(0, 3, 1, 2)), output_hidden_states=True)
    features = jax.jit(lambda p: tower.apply({"params": p}, *args, method="features"))(params)
    compare.close(features, out.hidden_states[-2][:, 1:], "CLIP penultimate layer")
    assert compare.ratio(features, out.hidden_states[-1][:, 1:]) > 0.01
    last, pooled = jax.jit(lambda p: tower.apply({"params": p}, *args))(params)
    compare.close(last, out.last_hidden_state, "CLIP last layer")
    compare.close(pooled, out.pooler_output, "CLIP pooled")
