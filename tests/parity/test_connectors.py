"""Pixel shuffle against Idefics 3's and SmolVLM's connectors, average pool against Gemma 3's projector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma3Config, Idefics3Config, SmolVLMConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from lvlm_jax.connectors import AveragePoolConfig, PixelShuffleConfig, keys
from lvlm_jax.nn.linear import abstract
from tests.parity import compare

WIDTH, TEXT = 24, 32


def features():
    return np.random.default_rng(0).normal(size=(3, 36, WIDTH)).astype(np.float32)


def check(config, model, what):
    """Values, and gradients of one scalar."""
    module, x = config.build(TEXT, jnp.float32), features()
    rows = keys.rows(config, "connector", "projector")
    shapes, _ = abstract(module, jnp.asarray(x))
    theirs = {f"projector.{key}": value for key, value in compare.tensors(model).items()}
    params = compare.load(rows, theirs, {"connector": shapes})
    run = jax.jit(lambda p, x: module.apply({"params": p["connector"]}, x))
    given = torch.tensor(x, requires_grad=True)
    out = model(given)
    out.square().sum().backward()
    compare.close(run(params, x), out, what)
    grads, into = jax.grad(lambda p, x: jnp.square(run(p, x)).sum(), argnums=(0, 1))(params, jnp.asarray(x))
    compare.close(into, given.grad, f"{what}, gradient of the features")
    expected = {f"projector.{key}": value for key, value in compare.gradients(model).items()}
    wanted = compare.load(rows, expected, {"connector": shapes})
    jax.tree.map(lambda a, b: compare.close(a, b, f"{what}, gradient of a weight"), grads, wanted)


@pytest.mark.parametrize(("config", "model"), [(Idefics3Config, Idefics3Connector), (SmolVLMConfig, SmolVLMConnector)])
@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle(config, model, factor):
    torch.manual_seed(0)
    text = {"model_type": "llama", "hidden_size": TEXT, "intermediate_size": 40, "num_attention_heads": 4}
    whole = config(vision_config={"hidden_size": WIDTH}, text_config=text, scale_factor=factor)
    check(PixelShuffleConfig(factor=factor), compare.perturb(model(whole)), f"{model.__name__}, factor {factor}")


@pytest.mark.parametrize("side", [2, 3])
def test_average_pool(side):
    torch.manual_seed(0)
    vision = {"hidden_size": WIDTH, "image_size": 42, "patch_size": 7, "layer_norm_eps": 1e-6}
    config = Gemma3Config(vision_config=vision, text_config={"hidden_size": TEXT}, mm_tokens_per_image=side**2)
    model = Gemma3MultiModalProjector(config)
    with torch.no_grad():
        model.mm_input_projection_weight.normal_(std=0.2)
    check(AveragePoolConfig(side=side), compare.perturb(model), f"Gemma 3 projector, {side} x {side}")
