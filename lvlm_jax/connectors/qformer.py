"""The querying transformer: a few learned queries read a picture's features, alone or beside a text.

BERT's post-norm layers; the queries cross-attend to the features in every n-th layer and have a feed-forward of their
own, and share self-attention with the text. Source: BLIP-2 (arXiv 2301.12597), section 3.1; InstructBLIP
(arXiv 2305.06500), section 2.3, which reads the instruction as its text.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.connectors import bert
from lvlm_jax.keymap import PUBLIC_ACTIVATIONS, UNBATCHED, Row, activation, fields, layer_norm, one_of
from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.mlp import Mlp
from lvlm_jax.nn.norms import LayerNorm
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int

Pattern = Literal["apart", "together", "causal"]

PATTERNS: dict[str, Callable[[Array, int], R.Ranges]] = {
    "apart": R.queries_apart,
    "together": R.queries_together,
    "causal": R.queries_causal,
}
"""Who sees whom when queries and text run together: the masks of the contrastive, the matching and the generating loss.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """Sizes of a Q-Former; as a connector, one dense layer to the language width follows.

    cross_every: the first of so many layers reads the picture. vocab: words of the text that it reads beside the
    picture (BERT's); None leaves out all that a text needs. context: positions of a text. extra: queries behind those,
    a parameter of their own, so that they may train while the first stay (VideoChat: 64).
    """

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    cross_every: int = 2
    vocab: int | None = None
    context: int = 512
    extra: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
        if self.cross_every < 1 or self.depth % self.cross_every:
            raise ValueError(
                f"depth={self.depth} does not divide into groups of cross_every={self.cross_every} layers, the first "
                "of which reads the picture"
            )

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row: the queries, however many features there are."""
        return self.queries + self.extra

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return QFormerProjector(self, width, dtype, scan, remat)


class Layer(nn.Module):
    """BERT's layer: attention, then a feed-forward, each normed after it is added; the first `queries` are apart.

    `cross`: the queries read the features too. Without features there are no queries, and all is text.
    """

    heads: int
    mlp_dim: int
    activation: str
    norm_eps: float
    queries: int = 0
    cross: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N S D"], _: Any, ranges: R.Ranges, features: Float[Array, "N P F"] | None = None
    ) -> tuple[Float[Array, "N S D"], None]:
        x = self._attended("attn", x, ranges)
        count = 0 if features is None else self.queries
        queries, text, out = x[:, :count], x[:, count:], []
        if count:
            if self.cross:
                everything = R.full(len(x), count, features.shape[1])
                queries = self._attended("cross", queries, everything, features)
            out.append(self._fed("query_mlp", queries))
        if text.shape[1]:
            out.append(self._fed("mlp", text))
        return jnp.concatenate(out, axis=1), None

    def _attended(self, name: str, x: Array, ranges: R.Ranges, context: Array | None = None) -> Array:
        attention = functools.partial(Attention, qkv_bias=True, out_bias=True, dtype=self.dtype, name=name)
        attention = attention(self.heads, self.heads, x.shape[-1] // self.heads)
        return self._norm(name, x + attention(x, ranges, context=context)[0])

    def _fed(self, name: str, x: Array) -> Array:
        return self._norm(name, x + Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name=name)(x))

    def _norm(self, name: str, x: Array) -> Array:
        return LayerNorm(self.norm_eps, self.dtype, name=f"{name}_norm")(x)


class Group(nn.Module):
    """Layers of which the first reads the picture: what a stack repeats."""

    layer: functools.partial
    size: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "N S D"], _: Any, ranges: R.Ranges, features: Float[Array, "N P F"] | None
    ) -> tuple[Float[Array, "N S D"], None]:
        for i in range(self.size):
            x, _ = self.layer(cross=i == 0, name=f"layer{i}")(x, None, ranges, features)
        return x, None


class QFormer(nn.Module):
    """Learned queries, text embeddings where the config has a vocabulary, and the layers that both share.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lvlm_jax.connectors import QFormer, qformer
      >>> from lvlm_jax.nn.linear import abstract
      >>> model = QFormer(qformer.PRESETS["qformer_blip2"], scan=True)
      >>> features = jnp.zeros((3, 257, 1408))  # [N, P, F]
      >>> params, _ = abstract(model, features)  # nothing is computed
      >>> jax.eval_shape(lambda p: model.apply({"params": p}, features), params).shape  # [N, Q, D]
      (3, 32, 768)

    Parameters: ``queries``, ``norm``, ``layers``; with a vocabulary ``embed`` and ``position_embed``.
    """

    config: QFormerConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """Queries, embeddings, their norm, layers."""
        c = self.config
        learned = named(nn.initializers.normal(0.02), ("positions", "embed"))
        latents = [self.param("queries", learned, (c.queries, c.width))]
        if c.extra:
            zeros = named(nn.initializers.zeros, ("positions", "embed"))
            latents.append(self.param("extra_queries", zeros, (c.extra, c.width)))
        self.latents = jnp.concatenate(latents)
        if c.vocab is not None:
            self.embed = Embed(c.vocab, c.width, self.dtype)
            self.places = self.param("position_embed", learned, (c.context, c.width))
        self.norm = LayerNorm(c.norm_eps, self.dtype)
        sizes = {"heads": c.heads, "mlp_dim": c.mlp_dim, "activation": c.activation, "norm_eps": c.norm_eps}
        layer = functools.partial(Layer, **sizes, queries=c.queries + c.extra, dtype=self.dtype)
        group = functools.partial(Group, layer=layer, size=c.cross_every)
        self.layers = make_stack(group, c.depth // c.cross_every, self.scan, self.remat)

    def __call__(
        self,
        features: Float[Array, "N P F"] | None,
        text: Int[Array, "N T"] | None = None,
        segments: Int[Array, "N T"] | None = None,
        pattern: Pattern = "together",
    ) -> Float[Array, "N S D"]:
        """States of the queries, then of the text: of either alone, or of both.

        Args:
          features: of a vision tower; None leaves the queries out.
          text: BERT's ids, padded on the right.
          segments: 0 where the text is padding, default nowhere.
          pattern: a key of `PATTERNS`.

        Raises:
          ValueError: a text that this Q-Former cannot read, or neither features nor text.
        """
        c = self.config
        if text is not None:
            self._check(text)
        elif c.vocab is not None and self.is_initializing():  # all parameters are made
            return self(features, jnp.zeros((len(features), 1), jnp.int32), None, pattern)[:, : len(self.latents)]
        elif features is None:
            raise ValueError("a Q-Former reads features, a text, or both; here neither is given")
        parts, rows = [], len(text if features is None else features)
        count = 0 if features is None else len(self.latents)
        if features is not None:
            features = features.astype(self.dtype)
            parts.append(jnp.broadcast_to(self.latents.astype(self.dtype), (rows, *self.latents.shape)))
        if text is not None:
            parts.append(self.embed(text) + self.places[: text.shape[1]].astype(self.dtype))
            shown = jnp.ones_like(text) if segments is None else segments
        else:
            shown = jnp.zeros((rows, 0), jnp.int32)
        x = self.norm(jnp.concatenate(parts, axis=1))
        return run_stack(self.layers, c.depth // c.cross_every, x, None, PATTERNS[pattern](shown, count), features)[0]

    def head_kernel(self) -> Float[Array, "D V"]:
        """The word table as the kernel of a tied head."""
        return self.embed.kernel()

    def _check(self, text: Array) -> None:
        c = self.config
        if c.vocab is None:
            raise ValueError("a text, but this Q-Former has no vocabulary: give its config one (vocab=30523 is BERT's)")
        if text.shape[1] > c.context:
            raise ValueError(f"{text.shape[1]} tokens, but this Q-Former's texts have context={c.context} positions")


class QFormerProjector(nn.Module):
    """`QFormer`, then a dense layer from the queries to the language width."""

    config: QFormerConfig
    width: int
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N P D"],
        instruction: Int[Array, "N T"] | None = None,
        segments: Int[Array, "N T"] | None = None,
    ) -> Float[Array, "N Q F"]:
        """Features -> visual tokens; `instruction` and `segments` are `QFormer`'s text (InstructBLIP).

        Raises:
          ValueError: a vocabulary and no instruction: what it would have asked the picture is missing.
        """
        c = self.config
        if c.vocab is not None and instruction is None and not self.is_initializing():
            raise ValueError(
                f"this Q-Former reads an instruction beside the picture (vocab={c.vocab}), and none is given; give it, "
                "or leave vocab out of its config"
            )
        qformer = QFormer(c, self.dtype, self.scan, self.remat, name="qformer")
        queries = qformer(x, instruction, segments)[:, : c.queries + c.extra]
        return linear(self.width, ("embed", "mlp"), use_bias=True, dtype=self.dtype, name="linear_1")(queries)


PRESETS: dict[str, QFormerConfig] = {
    # Salesforce/blip2-opt-2.7b, blip2-flan-t5-xl and their kin: BERT-base's sizes, no text
    "qformer_blip2": QFormerConfig(),
    # Salesforce/blip2-itm-vit-g, instructblip-vicuna-7b and their kin: BERT's words and [DEC]
    "qformer_text": QFormerConfig(vocab=30523),
}
"""Q-Formers by name."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys and config.json


@dataclasses.dataclass(frozen=True)
class Names:
    """How one way of writing a checkpoint names the parts: prefixes of the encoder and embeddings, the first norm."""

    encoder: str
    attention: str
    embeddings: str
    norm: str


LAYOUTS: dict[str, Names] = {
    "blip_2": Names("qformer.encoder.", "attention", "embeddings.", "qformer.layernorm"),
    "instructblip": Names("qformer.encoder.", "attention", "qformer.embeddings.", "qformer.embeddings.layernorm"),
    # the authors' repository
    "lavis": Names("Qformer.bert.encoder.", "self", "Qformer.bert.embeddings.", "Qformer.bert.embeddings.LayerNorm"),
    # OpenGVLab's VideoChat2
    "videochat2": Names(
        "qformer.bert.encoder.", "self", "qformer.bert.embeddings.", "qformer.bert.embeddings.LayerNorm"
    ),
}
"""One model, four layouts."""


def rows(config: QFormerConfig, ours: str = "qformer", theirs: str = "", layout: str = "blip_2") -> list[Row]:
    """The key table of a Q-Former with its queries.

    Args:
      ours: path of its parameters.
      theirs: prefix of its keys: "" in a BLIP-2, whose query tokens stand at the top.
      layout: a key of `LAYOUTS`.
    """
    names = LAYOUTS[layout]
    out = [Row(f"{ours}/queries", f"{theirs}query_tokens", UNBATCHED), *layer_norm(f"{ours}/norm", theirs + names.norm)]
    if config.extra:
        out.append(Row(f"{ours}/extra_queries", f"{theirs}extra_query_tokens", UNBATCHED))
    if config.vocab is not None:
        embeddings = theirs + names.embeddings
        out.append(Row(f"{ours}/embed/table", f"{embeddings}word_embeddings.weight"))
        out.append(Row(f"{ours}/position_embed", f"{embeddings}position_embeddings.weight"))
    for i in range(config.depth):
        a = f"{ours}/layers/{i // config.cross_every}/layer{i % config.cross_every}"
        b = f"{theirs}{names.encoder}layer.{i}"
        out += bert.attention_rows(f"{a}/attn", f"{b}.attention", names.attention)
        if i % config.cross_every == 0:
            out += bert.attention_rows(f"{a}/cross", f"{b}.crossattention", names.attention)
        out += bert.mlp_rows(f"{a}/query_mlp", b, "_query")
        out += bert.mlp_rows(f"{a}/mlp", b) if config.vocab is not None else []
    return out


DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": False,
}
"""What the public classes assume for fields that a Q-Former's config leaves out."""

TYPES = {"blip_2_qformer": False, "instructblip_qformer": True, "instructblipvideo_qformer": True}
"""Public ``model_type`` -> whether it always reads a text."""


def from_hf(config: Mapping[str, Any], queries: int) -> QFormerConfig:
    """The Q-Former from the ``qformer_config`` of a public config.json, with its ``num_query_tokens``.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    reads = TYPES[one_of("qformer_config.model_type", f.get("model_type", "blip_2_qformer"), TYPES)]
    one_of("position_embedding_type", f.get("position_embedding_type", "absolute"), ["absolute"])
    return QFormerConfig(
        queries=queries,
        width=f["hidden_size"],
        depth=f["num_hidden_layers"],
        heads=f["num_attention_heads"],
        mlp_dim=f["intermediate_size"],
        activation=activation("qformer_config.hidden_act", f["hidden_act"]),
        norm_eps=float(f["layer_norm_eps"]),
        cross_every=f["cross_attention_frequency"],
        vocab=f["vocab_size"] if reads or f["use_qformer_text_input"] else None,
        context=f["max_position_embeddings"],
    )


def to_hf(config: QFormerConfig, features: int, model_type: str = "blip_2_qformer") -> dict[str, Any]:
    """The ``qformer_config`` that the public classes read; `from_hf` reads it back. The queries stand beside it.

    Args:
      features: width of the vision tower.
      model_type: a key of `TYPES`.

    Raises:
      ValueError: no vocabulary, and a class that always reads a text.
    """
    reads = TYPES[one_of("model_type", model_type, TYPES)]
    if reads and config.vocab is None:
        raise ValueError(f"{model_type} reads an instruction, and this Q-Former has no vocabulary; use blip_2_qformer")
    text = {} if config.vocab is None else {"vocab_size": config.vocab}
    return {
        "model_type": model_type,
        **text,
        **({} if reads else {"use_qformer_text_input": config.vocab is not None}),
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": PUBLIC_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "cross_attention_frequency": config.cross_every,
        "encoder_hidden_size": features,
    }
