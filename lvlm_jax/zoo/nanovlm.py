"""nanoVLM's sizes: a small SigLIP tower to its very end, a pixel shuffle, SmolLM2.

Systems alone: the torch library has no class for them, so folders carry our own ``model_type``. Source: nanoVLM, the
repository of Hugging Face: its first release, of 222M weights, and the later one's sizes, without its split into tiles.
"""

import dataclasses

from lvlm_jax import llm, vision
from lvlm_jax.connectors import PixelShuffleConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.zoo.spec import HALF, Spec


def _system(name: str, decoder: str, side: int, factor: int, source: str) -> Spec:
    # SigLIP and SigLIP 2 at base size, patches of 16.
    tower = vision.siglip.PRESETS["siglip_b16_224"]
    sizes = dataclasses.replace(tower, image_size=side, pool="none", feature_layer=-1, feature_norm=True)
    # SmolLM2's 49152 words, then <image>, padded to a multiple of 64.
    words = dataclasses.replace(llm.smollm2.PRESETS[decoder], vocab=49216)
    config = LVLMConfig(vision=sizes, connector=PixelShuffleConfig(factor=factor, std=0.02), llm=words)
    image = ImageSpec(size=side, patch=16, mean=HALF, std=HALF, resample="bicubic", fit="squash")
    return Spec(
        name=name,
        config=config,
        image=image,
        template="smollm2",
        source=source,
        image_token_id=49152,
        released=False,
    )


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("nanovlm_222m", "smollm2_135m", 224, 2, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        _system("nanovlm_450m", "smollm2_360m", 512, 4, "HuggingFaceTB/SmolLM2-360M-Instruct"),
    )
}
"""Systems by name; `source` has the tokenizer and the language model, the tower is SigLIP's release."""
