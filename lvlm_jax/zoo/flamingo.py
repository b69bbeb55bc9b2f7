"""Flamingo proper, of which nothing is public: NFNet-F6, a resampler, Chinchilla with gated blocks between its layers.

Source: Flamingo (arXiv 2204.14198), tables 4 and 5, appendices A.1.4 and B.1.1. A whole model is written as an
OpenFlamingo is. Each frame of a video is a picture of its own here: the paper's embeddings of frames are left out.
"""

import dataclasses

from lvlm_jax import llm, vision
from lvlm_jax.connectors import FLAMINGO, PerceiverConfig
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.zoo.spec import IMAGENET_MEAN, IMAGENET_STD, Spec

# In the sizes of appendix B.1.2; what is read is the last stage's map, 1,536 wide as the resampler of table 4 is.
_TOWER = dataclasses.replace(
    vision.nfnet.PRESETS["nfnet_f6"], image_size=320, classes=0, feature_layer=-2, **vision.nfnet.AUTHORS
)
_IMAGE = ImageSpec(size=320, patch=32, mean=IMAGENET_MEAN, std=IMAGENET_STD, resample="bicubic", fit="pad")
_RESAMPLER = PerceiverConfig(**FLAMINGO | {"heads": 16, "head_dim": 96}, activation="squared_relu", project=False)


def _system(name: str, chinchilla: str, every: int) -> Spec:
    decoder = llm.chinchilla.PRESETS[chinchilla]
    # Their words are as many as LLaMA's, whose tokenizer stands in; then come <|endofchunk|>, <image> and <PAD>.
    config = LVLMConfig(
        vision=_TOWER,
        connector=_RESAMPLER,
        llm=dataclasses.replace(decoder, vocab=decoder.vocab + 3),
        fusion=CrossAttentionConfig(
            every=every,
            place="before_first",
            heads=decoder.heads,
            head_dim=decoder.head_width,
            activation="squared_relu",
        ),
    )
    return Spec(
        name=name,
        config=config,
        image=_IMAGE,
        template="flamingo",
        source="",
        tokenizer="huggyllama/llama-7b",
        image_token_id=decoder.vocab + 1,
        released=False,
    )


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("flamingo_3b", "chinchilla_1.4b", 1),
        _system("flamingo_9b", "chinchilla_7b", 4),
        _system("flamingo_80b", "chinchilla_70b", 7),
    )
}
"""Systems by name."""
