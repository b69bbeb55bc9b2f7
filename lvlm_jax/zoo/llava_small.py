"""LLaVA's recipe at 0.9 to 5 billion weights, for one free accelerator: SigLIP, a two-layer MLP, Qwen3 or Gemma 3.

Systems alone: their class is LLaVA's. No release: towers and language models are public, the connector is to be
trained (``configs/qwen3_llava_small.py``).
"""

import dataclasses

from lvlm_jax import llm, vision
from lvlm_jax.connectors import MlpConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.zoo.spec import HALF, Spec

_TOWER = dataclasses.replace(vision.siglip.PRESETS["siglip_so400m_14_384"], pool="none")


def _system(name: str, decoder: str, source: str, template: str, vocab: int, image_token_id: int) -> Spec:
    words = {**llm.qwen3.PRESETS, **llm.gemma3.PRESETS}[decoder]
    config = LVLMConfig(vision=_TOWER, connector=MlpConfig(), llm=dataclasses.replace(words, vocab=vocab))
    image = ImageSpec(size=384, patch=14, mean=HALF, std=HALF, resample="bicubic", fit="squash")
    return Spec(
        name=name,
        config=config,
        image=image,
        template=template,
        source=source,
        image_token_id=image_token_id,
        released=False,
    )


def _qwen3(size: str) -> Spec:
    # The tokenizer has 151,669 words and the table room up to 151,936: <image> is the next.
    return _system(f"llava_qwen3_{size}", f"qwen3_{size}", f"Qwen/Qwen3-{size.upper()}", "qwen_chatml", 151936, 151669)


def _gemma3(size: str) -> Spec:
    # The tokenizer of all sizes has 262,145 words, the last <image_soft_token>: <image> is the next. The 1B's table
    # grows for them to a multiple of 64, which the 4B's is.
    return _system(f"llava_gemma3_{size}", f"gemma3_{size}", f"google/gemma-3-{size}-it", "gemma", 262208, 262145)


SYSTEMS: dict[str, Spec] = {
    spec.name: spec for spec in (*map(_qwen3, ("0.6b", "1.7b", "4b")), *map(_gemma3, ("1b", "4b")))
}
"""Systems by name; `source` has the tokenizer and the language model."""
