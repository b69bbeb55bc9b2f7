"""A whole system of a few thousand random weights, which answers something different to each prompt."""

import functools

import jax.numpy as jnp
import numpy as np

from lvlm_jax.connectors import MlpConfig
from lvlm_jax.infer.system import System
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.params import flatten, stack_layers, unflatten
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tiles import Tiles
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.vision.vit import ViTConfig
from tests.tokenizers_tiny import llama_tiny


def _weights(config: LVLMConfig) -> dict:
    """Larger than fresh weights, which would repeat one token: so the answer depends on what was asked and shown."""
    shapes, _ = abstract(LVLM(config), dummy_batch(config))
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in flatten(shapes).items():
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        scale = 2 / np.sqrt(leaf.shape[0]) if path.endswith("kernel") else 0.1
        flat[path] = jnp.asarray(noise * scale + path.endswith("scale"))
    return unflatten(flat)


TILED = ImageSpec(
    size=16,
    patch=8,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    fit="squash",
    tiles=Tiles(pinpoints=((16, 32), (32, 16), (32, 32))),
)


@functools.cache
def tiny_system(context: int = 192, scan: bool = False, attention: str = "causal", tiles: bool = False) -> System:
    """The same weights in either shape of the stack; with `tiles`, pictures of any resolution."""
    tokenizer = Tokenizer(llama_tiny())
    vision = ViTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32)
    decoder = DecoderConfig(vocab=512, width=32, depth=2, heads=8, kv_heads=4, mlp_dim=48, context=context)
    config = LVLMConfig(vision=vision, connector=MlpConfig(), llm=decoder, attention=attention, newline=tiles)
    params = _weights(config)
    if scan:
        params = stack_layers(params)
    return System(
        model=LVLM(config, scan=scan),
        params=params,
        tokenizer=tokenizer,
        spec=TILED if tiles else ImageSpec(size=16, patch=8, mean=(0.5,) * 3, std=(0.5,) * 3),
        template=TEMPLATES["vicuna_v1"].with_system(""),
        image_token_id=tokenizer.special_id("<image>"),
        rows=4,
        name="tiny",
    )


def few_shapes(monkeypatch) -> None:
    """Coarse buckets, for tests that ask many questions and are not about shapes: each shape costs a compilation."""
    monkeypatch.setattr("lvlm_jax.infer.generate.bucket", lambda length: -(-length // 64) * 64)
