"""A whole system of a few thousand random weights, which answers something different to each prompt."""

import functools

import jax

from lvlm_jax.connectors import MlpConfig
from lvlm_jax.infer.system import System
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import init
from lvlm_jax.processing.chat_templates import TEMPLATES
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.vision.vit import ViTConfig
from tests.tokenizers_tiny import llama_tiny


@functools.cache
def tiny_system(context: int = 192, scan: bool = False, attention: str = "causal") -> System:
    """The same weights in either shape of the stack."""
    tokenizer = Tokenizer(llama_tiny())
    vision = ViTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32)
    decoder = DecoderConfig(vocab=512, width=32, depth=2, heads=8, kv_heads=4, mlp_dim=48, context=context)
    config = LVLMConfig(vision=vision, connector=MlpConfig(), llm=decoder, attention=attention)
    params = init(LVLM(config), jax.random.key(0), dummy_batch(config))
    # Fresh weights repeat one token; larger ones make the answer depend on what was asked and shown.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda x: x * 2 + 0.1 * jax.random.normal(next(keys), x.shape), params)
    if scan:
        from lvlm_jax.params import stack_layers

        params = stack_layers(params)
    return System(
        model=LVLM(config, scan=scan),
        params=params,
        tokenizer=tokenizer,
        spec=ImageSpec(size=16, patch=8, mean=(0.5,) * 3, std=(0.5,) * 3),
        template=TEMPLATES["vicuna_v1"].with_system(""),
        image_token_id=tokenizer.special_id("<image>"),
        rows=4,
        name="tiny",
    )
