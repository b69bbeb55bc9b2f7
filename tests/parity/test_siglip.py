"""SigLIP: both towers, pooling head, scale and bias, and a tower without its head."""

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import siglip
from lvlm_jax.vision.vit import VisionTower, patchify
from lvlm_jax.zoo import dual
from tests.parity import compare
from tests.parity.test_clip import TEXT, VISION, both, load, pictures, texts

TOWER = {name: value for name, value in VISION.items() if name != "projection_dim"}
WORDS = {name: value for name, value in TEXT.items() if name != "projection_dim"}

# Its fresh matrices are ten times those of the others: five times them again, the reference in float32 differs from
# itself in float64 by more than the tolerance (2.3e-5), for softmax is saturated.
FACTOR = 2.0


def test_joint_space():
    torch.manual_seed(0)
    model = compare.perturb(SiglipModel(SiglipConfig(text_config=WORDS, vision_config=TOWER)), factor=FACTOR)
    config = dual.from_hf(model.config.to_dict())
    module, params = load(model, config)
    images, tokens = pictures(), texts(2)
    run = jax.jit(lambda p: module.apply({"params": p}, jnp.asarray(images), jnp.asarray(tokens), 7, method=both))
    image, text, scores = run(params)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
    compare.close(image, out.image_embeds, "SigLIP image_embeds")
    compare.close(text, out.text_embeds, "SigLIP text_embeds")
    compare.close(scores, out.logits_per_image, "SigLIP logits")
    unread = {path for path in compare.dead(lambda p: run(p)[2], params) if not path.endswith("k/bias")}
    assert unread == set()


@pytest.mark.parametrize("head", [True, False])
def test_tower(head):
    torch.manual_seed(0)
    model = compare.perturb(SiglipVisionModel(SiglipVisionConfig(**TOWER, vision_use_head=head)), factor=FACTOR)
    config = siglip.from_hf(model.config.to_dict())
    tower = VisionTower(config)
    args = patchify(jnp.asarray(pictures()), 7)
    shapes, _ = abstract(tower, *args)
    params = compare.load(siglip.rows(config, "", ""), compare.tensors(model, siglip.UNUSED), shapes)
    with torch.no_grad():
        out = model(torch.tensor(pictures().transpose(0, 3, 1, 2)), output_hidden_states=True)
    last, pooled = jax.jit(lambda p: tower.apply({"params": p}, *args))(params)
    compare.close(last, out.last_hidden_state, "SigLIP last layer")
    if head:
        compare.close(pooled, out.pooler_output, "SigLIP pooled")
    features = jax.jit(lambda p: tower.apply({"params": p}, *args, method="features"))(params)
    compare.close(features, out.hidden_states[-2], "SigLIP penultimate layer")
