"""BLIP-2's image-text models, whole: key tables of the torch library's retrieval class and of the authors."""

from lvlm_jax import vision
from lvlm_jax.connectors import qformer
from lvlm_jax.keymap import Row, dense, layer_norm
from lvlm_jax.models.image_text import ImageTextConfig


def rows(config: ImageTextConfig) -> list[Row]:
    """The key table of the torch library's retrieval class, whose checkpoints do not pre-train.

    Raises:
      ValueError: a model that pre-trains: `lavis_rows` has the keys of those.
    """
    if config.pretrains:
        raise ValueError("pretrains=True, but the torch library's retrieval class has no word head and no temperature")
    tower = vision.FAMILIES[vision.family_of(config.vision)].rows(config.vision, "vision", "vision_model.")
    return [*tower, *joint_rows(config)]


def joint_rows(config: ImageTextConfig) -> list[Row]:
    """`rows` less the vision tower's."""
    return qformer.rows(config.qformer) + _heads("vision_projection", "text_projection")


def _heads(image: str, text: str) -> list[Row]:
    names = (("vision_projection", image), ("text_projection", text), ("match_head", "itm_head"))
    return [row for ours, theirs in names for row in dense(ours, theirs, bias=True)]


def lavis_rows(config: ImageTextConfig) -> list[Row]:
    """The key table of the authors' checkpoints, which hold what was trained: of the vision tower its last norm alone.

    They keep the word table and the bias of each word twice, under keys that `LAVIS_UNUSED` matches.
    """
    out = qformer.rows(config.qformer, layout="lavis") + layer_norm("vision/post_norm", "ln_vision")
    out += _heads("vision_proj", "text_proj")
    if config.pretrains:
        head = "Qformer.cls.predictions"
        out += dense("word_head/dense", f"{head}.transform.dense", bias=True)
        out += layer_norm("word_head/norm", f"{head}.transform.LayerNorm")
        out += [Row("word_head/bias", f"{head}.bias"), Row("temperature", "temp")]
    return out


LAVIS_UNUSED = (r"Qformer\.cls\.predictions\.decoder\.(weight|bias)", r"Qformer\.bert\.embeddings\.position_ids")
"""Patterns of the authors' keys that hold nothing of their own."""
