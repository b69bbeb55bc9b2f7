"""What the zoo says of a whole system: values, no code."""

import dataclasses

from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.processing.image import ImageSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
"""SigLIP's mean and standard deviation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One system.

    template: a key of `processing.chat_templates.TEMPLATES`. source: hub name of its weights and tokenizer; where
    nobody `released` the whole, of its tokenizer and language model. image_token_id: the id that stands where a
    picture's tokens go. video: which frames of a video it is shown.
    """

    name: str
    config: LVLMConfig
    image: ImageSpec
    template: str
    source: str
    image_token_id: int
    released: bool = True
    video: VideoSpec = DEFAULT
