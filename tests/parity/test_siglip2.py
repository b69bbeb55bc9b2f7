"""SigLIP 2: pictures of any shape beside one another, both towers, pooling head, scale and bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig, Siglip2VisionModel

from lvlm_jax.models.contrastive import DualEncoder
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import siglip2
from lvlm_jax.vision.vit import VisionTower
from lvlm_jax.zoo import dual
from tests import tiny
from tests.parity import compare
from tests.parity.test_clip import texts
from tests.parity.test_siglip import WORDS

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_patches": 16,
    "patch_size": 7,
}
GRIDS = [(4, 4), (2, 7), (5, 3), (1, 2)]
PATCHES = 20
# As for SigLIP: its fresh matrices are large, and softmax is saturated at five times them.
FACTOR = 2.0


def pictures():
    """(patches, positions, segments) of four pictures, their last places padding that holds rubbish."""
    patches = np.random.default_rng(0).normal(size=(len(GRIDS), PATCHES, 147)).astype(np.float32)
    positions, segments = np.zeros((len(GRIDS), PATCHES, 2), np.int32), np.zeros((len(GRIDS), PATCHES), np.int32)
    for n, (rows, cols) in enumerate(GRIDS):
        positions[n, : rows * cols] = np.stack(np.meshgrid(range(rows), range(cols), indexing="ij"), -1).reshape(-1, 2)
        segments[n, : rows * cols] = 1
    return patches, positions, segments


def theirs():
    patches, _, segments = pictures()
    return {
        "pixel_values": torch.tensor(patches),
        "pixel_attention_mask": torch.tensor(segments),
        "spatial_shapes": torch.tensor(GRIDS),
    }


@pytest.mark.parametrize("head", [True, False])
def test_tower(head):
    torch.manual_seed(0)
    model = compare.perturb(Siglip2VisionModel(Siglip2VisionConfig(**SIZES, vision_use_head=head)), factor=FACTOR)
    config = siglip2.from_hf(model.config.to_dict())
    tower, args = VisionTower(config), [jnp.asarray(x) for x in pictures()]
    shapes, _ = abstract(tower, *args)
    params = compare.load(siglip2.rows(config, "", ""), compare.tensors(model, siglip2.UNUSED), shapes)
    with torch.no_grad():
        out = model(**theirs(), output_hidden_states=True)
    run = tiny.jit(lambda p: tower.apply({"params": p}, *args))
    last, pooled = run(params)
    features = tiny.jit(lambda p: tower.apply({"params": p}, *args, method="features"))(params)
    for n, (rows, cols) in enumerate(GRIDS):
        real = slice(0, rows * cols)
        compare.close(last[n, real], out.last_hidden_state[n, real], f"SigLIP 2 last layer of {rows} x {cols}")
        compare.close(
            features[n, real], out.hidden_states[-2][n, real], f"SigLIP 2 penultimate layer of {rows} x {cols}"
        )
    if head:
        compare.close(pooled, out.pooler_output, "SigLIP 2 pooled")
        dead = compare.dead(lambda p: run(p)[1], params)
        assert {path for path in dead if not path.endswith("k/bias")} == set()


def test_joint_space():
    torch.manual_seed(0)
    config = Siglip2Config(text_config=WORDS, vision_config=SIZES)
    model = compare.perturb(Siglip2Model(config), factor=FACTOR)
    config = dual.from_hf(model.config.to_dict())
    assert dual.to_hf(config)["model_type"] == "siglip2"
    module, tokens, images = DualEncoder(config), jnp.asarray(texts(2)), [jnp.asarray(x) for x in pictures()]

    def both(module, tokens, *images):
        image, text = module.embed_images(*images), module.embed_text(tokens)
        return image, text, jnp.exp(module.logit_scale) * image @ text.T + module.logit_bias

    shapes, _ = abstract(module, tokens, *images, method=both)
    params = compare.load(dual.rows(config), compare.tensors(model, siglip2.UNUSED), shapes)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(texts(2)), **theirs())
    image, text, scores = tiny.jit(lambda p: module.apply({"params": p}, tokens, *images, method=both))(params)
    compare.close(image, out.image_embeds, "SigLIP 2 image_embeds")
    compare.close(text, out.text_embeds, "SigLIP 2 text_embeds")
    compare.close(scores, out.logits_per_image, "SigLIP 2 logits")


def test_gradient_of_the_position_table():
    """The one weight whose use differs from picture to picture."""
    torch.manual_seed(0)
    model = compare.perturb(Siglip2VisionModel(Siglip2VisionConfig(**SIZES)), factor=FACTOR)
    config = siglip2.from_hf(model.config.to_dict())
    tower, args = VisionTower(config), [jnp.asarray(x) for x in pictures()]
    params = compare.load(
        siglip2.rows(config, "", ""), compare.tensors(model, siglip2.UNUSED), abstract(tower, *args)[0]
    )
    model(**theirs()).pooler_output.square().sum().backward()
    grads = tiny.jit(jax.grad(lambda p: jnp.square(tower.apply({"params": p}, *args)[1]).sum()))(params)
    compare.close(grads["trunk"]["position_embed"], model.embeddings.position_embedding.weight.grad, "d positions")
