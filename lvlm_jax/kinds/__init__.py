"""The kinds of training stages by name, each with its model, loss, evaluation and export: one file a kind."""

from lvlm_jax.kinds import contrastive, image_text, language, pformer, unified, vq
from lvlm_jax.kinds.kind import Asking, Kind

KINDS: dict[str, Kind] = {
    "language": language.KIND,
    "contrastive": contrastive.KIND,
    "vq": vq.KIND,
    "unified": unified.KIND,
    "image_text": image_text.KIND,
    "pformer": pformer.KIND,
}
"""What ``stages.X.loss`` of a recipe may name."""

SECTIONS: tuple[type, ...] = tuple(dict.fromkeys(kind.section for kind in KINDS.values() if kind.section))
"""Dataclasses that ``config.model`` may be beside a vision-language model's."""

__all__ = ["KINDS", "SECTIONS", "Asking", "Kind"]
