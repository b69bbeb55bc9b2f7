"""The prompt former: BERT reads a sentence and gives the prompt that a frozen language model would write it from.

Trained on text alone, then held fixed as what a Q-Former's queries should look like (`train.pformer_losses`). Source:
BLIText (arXiv 2307.07063), section 3, and its repository.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.connectors import bert
from lvlm_jax.connectors.qformer import Layer
from lvlm_jax.keymap import Row, dense, layer_norm
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.norms import LayerNorm, unit
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PFormerConfig:
    """Sizes of a P-Former. prompt: how many vectors it gives; contrast: width in which sentences are told apart."""

    prompt: int = 32
    contrast: int = 256
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    vocab: int = 30522
    context: int = 512
    types: int = 2

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")


class PFormer(nn.Module):
    """BERT, and what makes a prompt of its first token.

    Parameters: BERT's ``embed``, ``position_embed``, ``type_embed``, ``norm`` and ``layers``; ``spread`` (one vector to
    the whole prompt), ``pool``, ``project`` (to the language width), ``sentence`` and ``temperature``.

    Attributes:
      width: of the language model.
    """

    config: PFormerConfig
    width: int
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B E"]]:
        """(prompt, unit vector of the sentence).

        Args:
          tokens: BERT's ids, [CLS] first.
          segments: 0 where a text is padding.

        Raises:
          ValueError: more tokens than there are positions.
        """
        c = self.config
        if tokens.shape[1] > c.context:
            raise ValueError(f"{tokens.shape[1]} tokens, but this P-Former has {c.context} positions")
        table = functools.partial(self.param, init_fn=named(nn.initializers.normal(0.02), ("positions", "embed")))
        x = Embed(c.vocab, c.width, self.dtype, name="embed")(tokens)
        x = x + table("position_embed", shape=(c.context, c.width))[: tokens.shape[1]].astype(self.dtype)
        x = x + table("type_embed", shape=(c.types, c.width))[0].astype(self.dtype)  # all of the first sentence
        x = LayerNorm(c.norm_eps, self.dtype, name="norm")(x)
        sizes = {"heads": c.heads, "mlp_dim": c.mlp_dim, "activation": c.activation, "norm_eps": c.norm_eps}
        layer = functools.partial(Layer, **sizes, dtype=self.dtype)
        stack = make_stack(layer, c.depth, self.scan, self.remat, name="layers")
        first = run_stack(stack, c.depth, x, None, R.packed_full(segments))[0][:, 0]
        wide = functools.partial(linear, use_bias=True, dtype=self.dtype)
        x = wide(c.prompt * c.width, ("embed", "mlp"), name="spread")(first).reshape(-1, c.prompt, c.width)
        x = jnp.tanh(wide(c.width, ("embed", None), name="pool")(x))
        sentence = unit(wide(c.contrast, ("embed", None), name="sentence")(first))
        self.param("temperature", named(nn.initializers.constant(0.07), ()), ())  # read by the loss
        return wide(self.width, ("embed", "mlp"), name="project")(x), sentence


PRESETS: dict[str, PFormerConfig] = {
    # yiren-jian/BLIText, Pretrain_stage0: bert-base-uncased's sizes, BLIP-2's number of queries
    "pformer_bert_base": PFormerConfig(),
}
"""P-Formers by name."""


def rows(
    config: PFormerConfig, ours: str = "pformer", theirs: str = "Pformer.", project: str = "opt_proj"
) -> list[Row]:
    """The key table in the authors' naming: BERT's, with their heads beside it.

    Args:
      ours: path of its parameters.
      theirs: prefix of its keys.
      project: their name of the projection to the language width: opt_proj or t5_proj.
    """
    emb = f"{theirs}embeddings."
    out = [
        Row(f"{ours}/embed/table", f"{emb}word_embeddings.weight"),
        Row(f"{ours}/position_embed", f"{emb}position_embeddings.weight"),
        Row(f"{ours}/type_embed", f"{emb}token_type_embeddings.weight"),
        *layer_norm(f"{ours}/norm", f"{emb}LayerNorm"),
        Row(f"{ours}/temperature", f"{theirs}temp"),
    ]
    for i in range(config.depth):
        a, b = f"{ours}/layers/{i}", f"{theirs}encoder.layer.{i}"
        out += bert.attention_rows(f"{a}/attn", f"{b}.attention") + bert.mlp_rows(f"{a}/mlp", b)
    for x, y in (("spread", "cls_proj"), ("pool", "pooler.0"), ("sentence", "text_proj"), ("project", project)):
        out += dense(f"{ours}/{x}", theirs + y, bias=True)
    return out
