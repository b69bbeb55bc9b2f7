"""BLIP-2's image-text models, whole: key tables of the torch library's retrieval class, of the authors, and of BERT."""

from collections.abc import Sequence

import jax.numpy as jnp

from lvlm_jax import vision
from lvlm_jax.connectors import bert, qformer
from lvlm_jax.keymap import SAME, Change, Row, dense, layer_norm
from lvlm_jax.models.image_text import ImageTextConfig
from lvlm_jax.params import add_rows


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
    return [*out, *_word_head("Qformer."), Row("temperature", "temp")] if config.pretrains else out


def _word_head(theirs: str, change: Change = SAME) -> list[Row]:
    head = f"{theirs}cls.predictions"
    out = dense("word_head/dense", f"{head}.transform.dense", bias=True)
    out += layer_norm("word_head/norm", f"{head}.transform.LayerNorm")
    return [*out, Row("word_head/bias", f"{head}.bias", change)]


LAVIS_UNUSED = (r"Qformer\.cls\.predictions\.decoder\.(weight|bias)", r"Qformer\.bert\.embeddings\.position_ids")
"""Patterns of the authors' keys that hold nothing of their own."""


def bert_rows(config: ImageTextConfig) -> list[Row]:
    """The key table of the BERT that pre-training begins from, to be loaded alone: both feed-forwards are BERT's.

    The names are those that the torch library has in memory (the oldest files call a norm's weight and bias gamma and
    beta). Queries, cross-attention and projections begin at random; BERT's token types, pooler and second head have no
    place here. Words beyond BERT's, such as [DEC], begin as the mean of its own.
    """
    c, ours, emb = config.qformer, "qformer", "bert.embeddings."
    grown = Change(lambda x: add_rows(jnp.asarray(x), c.vocab - len(x), axis=0), lambda x: x)
    out = [
        Row(f"{ours}/embed/table", f"{emb}word_embeddings.weight", grown),
        Row(f"{ours}/position_embed", f"{emb}position_embeddings.weight"),
        *layer_norm(f"{ours}/norm", f"{emb}LayerNorm"),
    ]
    for i in range(c.depth):
        a, b = f"{ours}/layers/{i // c.cross_every}/layer{i % c.cross_every}", f"bert.encoder.layer.{i}"
        out += bert.attention_rows(f"{a}/attn", f"{b}.attention")
        twice = (bert.mlp_rows(f"{a}/{name}", b) for name in ("query_mlp", "mlp"))
        out += [_alike(rows) for rows in zip(*twice, strict=True)]
    return [*out, *_word_head("", grown)] if config.pretrains else out


def _alike(rows: Sequence[Row]) -> Row:
    """Several leaves that begin as one tensor."""
    one = rows[0].change
    change = Change(lambda x: (one.load(x),) * len(rows), lambda *leaves: one.save(leaves[0]))
    return Row(tuple(row.ours for row in rows), rows[0].theirs, change)
