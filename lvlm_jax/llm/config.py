"""What a decoder is: its sizes, and the parts in which families differ."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from lvlm_jax.nn.positions import RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder, and the parts in which families differ; the defaults are LLaMA's.

    Sizes: `context` is the longest sequence it was trained for; `head_dim` None means width / heads; `embed_width`
    that of the embedding table and of the head, with a projection between it and the layers; None means the width.

    Parts: `norm` is a key of `nn.norms.NORMS`, used throughout; `order` says where norms stand and what is added to
    what (`llm.block.Block`), `residual_scale` what the stream is multiplied by in the order "normed";
    `final_norm` is the one behind the last layer. `post_norms` adds one behind each branch, `qk_norm` one for each
    head's queries and keys ("head_layer": a layer norm with weights of each head's own; "whole": one for those of all
    heads together). `mlp` is "gated" or "plain". `clip_qkv` bounds queries, keys and values. `scale_embeddings`
    multiplies token embeddings (not what stands beside them) by sqrt(width). Scores are divided by
    sqrt(`query_scalar`), default the head width, and bent by `attn_softcap`; logits by `final_softcap`.

    Positions are of one kind. "rotary": the first `rotary_fraction` of a head is rotated, in pairs as `rotary_pairs`
    says; with "halves", positions are counted twice, and each half of a head is rotated by its own count; with `mrope`
    they are counted along as many axes as it has numbers, and that many pairs of a head turn by each
    (`nn.positions.mrope_axes`: in blocks, or with `mrope_interleaved` by turns). "learned": a
    table of context + `position_offset` rows is added to what goes in, from row `position_offset` on. "alibi": scores
    fall with the distance, in the head that falls least by 2^-`alibi_max` a position (`nn.positions.alibi`).
    "relative": queries are compared with the distance itself, too (`nn.relative.RelativeKeys`).

    `pattern` repeats over the layers: a "global" one sees all before, a "local" one the last `window` positions,
    rotated by `local_theta` without scaling where that is given.

    `public`: the public ``model_type`` to write where several hold the same values; None takes the first that does.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_dim: int
    head_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tied: bool = False
    context: int = 4096
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    norm: Literal["rms", "offset_rms", "layer", "layer_no_bias"] = "rms"
    qk_norm: bool | Literal["head_layer", "whole"] = False
    post_norms: bool = False
    scale_embeddings: bool = False
    query_scalar: int | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    pattern: tuple[str, ...] = ("global",)
    local_theta: float | None = None
    rotary_fraction: float = 1.0
    rotary_pairs: Literal["half", "interleaved", "halves"] = "half"
    order: Literal["pre", "post", "normed", "parallel", "parallel_shared", "swin"] = "pre"
    residual_scale: float = 1.0
    final_norm: bool = True
    mlp: Literal["gated", "plain"] = "gated"
    mlp_bias: bool = False
    out_bias: bool = False
    clip_qkv: float | None = None
    positions: Literal["rotary", "learned", "alibi", "relative"] = "rotary"
    position_offset: int = 0
    alibi_max: float = 8.0
    embed_width: int | None = None
    mrope: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    public: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices = get_args(field.type) if get_origin(field.type) is Literal else None
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(f"{field.name}={getattr(self, field.name)!r} is none of {', '.join(choices)}")
        self._check_heads()
        self._check_positions()
        if self.post_norms and self.order != "pre":
            raise ValueError(
                f"post_norms=True with order={self.order!r}: only order='pre' has norms behind its branches"
            )
        for name in ("attn_softcap", "final_softcap"):
            if (cap := getattr(self, name)) is not None and cap <= 0:
                raise ValueError(f"{name}={cap}: scores are bent into (-cap, cap); None leaves them as they are")
        if self.residual_scale != 1 and self.order != "normed":
            raise ValueError(
                f"residual_scale={self.residual_scale} with order={self.order!r}: only 'normed' scales sums"
            )
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ValueError(f"clip_qkv={self.clip_qkv}: values are cut to [-clip, clip]; None leaves them as they are")
        if not self.pattern or not set(self.pattern) <= {"global", "local"}:
            raise ValueError(f"pattern={self.pattern!r}: a tuple of 'global' and 'local', repeated over the layers")
        if ("local" in self.pattern) != (self.window is not None):
            raise ValueError(
                f"pattern={self.pattern!r} and window={self.window}: local layers, and only they, need one"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: a local layer sees at least its own position")
        if self.local_theta is not None and self.window is None:
            raise ValueError(
                f"local_theta={self.local_theta} rotates local layers, and pattern={self.pattern!r} has none"
            )

    def _check_heads(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} do not divide into groups of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}; change one, or set head_dim")

    def _check_positions(self) -> None:
        given = {**self.parts, **({} if self.rope_scaling is None else {"rope_scaling": self.rope_scaling})}
        for kind, names in _POSITIONS.items():
            if self.positions != kind and (others := [name for name in names if name in given]):
                raise ValueError(f"positions={self.positions!r}: only {kind!r} ones have {', '.join(others)}")
        if self.positions != "rotary":
            return
        if self.head_width % 2:
            raise ValueError(f"heads of width {self.head_width} cannot be rotated in pairs; choose an even head_dim")
        if self.rotary_pairs == "halves" and (self.rotary_fraction != 1 or self.head_width % 4 or self.local_theta):
            raise ValueError(
                f"rotary_pairs='halves' with rotary_fraction={self.rotary_fraction}, heads of {self.head_width} and "
                f"local_theta={self.local_theta}: it rotates both halves of a head whole, each in pairs, by one base"
            )
        if self.mrope_interleaved and self.mrope is None:
            raise ValueError("mrope_interleaved=True with mrope=None: there are no axes to take by turns; give mrope")
        if self.mrope is not None:
            self._check_mrope(self.mrope)
        if not 0 < self.rotary_width <= self.head_width or self.rotary_width % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} rotates {self.rotary_width} of {self.head_width} values of a "
                "head; it must be an even number of them, at least 2"
            )

    def _check_mrope(self, sections: tuple[int, ...]) -> None:
        if sum(sections) * 2 != self.rotary_width or len(sections) < 2 or min(sections) < 0:
            raise ValueError(
                f"mrope={sections} shares {sum(sections)} pairs out among {len(sections)} axes, but a head rotates "
                f"{self.rotary_width // 2}; it must name so many, of two axes or more"
            )
        if self.rotary_pairs == "halves" or self.local_theta is not None:
            raise ValueError(
                f"mrope={sections} with rotary_pairs={self.rotary_pairs!r} and local_theta={self.local_theta}: axes "
                "are shared out over whole heads that all layers rotate alike"
            )

    @property
    def head_width(self) -> int:
        """Width of one head (E)."""
        return self.head_dim or self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """How many values of a head are rotated."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """ "global" or "local" for each layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    @property
    def counts(self) -> int:
        """How many numbers say where a position stands."""
        if self.mrope is not None:
            return len(self.mrope)
        return 2 if self.rotary_pairs == "halves" else 1

    def holds(self, parts: Mapping[str, Any], optional: Iterable[str] = ()) -> bool:
        """Whether it has exactly these `parts`, and beside them at most the `optional` ones; the rest is LLaMA's."""
        found = self.parts
        extra = found.keys() - set(optional) - parts.keys()
        return not extra and all(found.get(name) == value for name, value in parts.items())

    @property
    def whole_heads(self) -> bool:
        """Whether every head has keys of its own and all together are as wide as the model."""
        return self.kv_heads == self.heads and self.heads * self.head_width == self.width

    @property
    def parts(self) -> dict[str, Any]:
        """The values in which it differs from LLaMA's decoder, sizes apart."""
        fields = [f for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING and f.name not in _COMMON]
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}


_POSITIONS = {
    "rotary": ("rope_scaling", "rotary_fraction", "rotary_pairs", "local_theta", "mrope", "mrope_interleaved"),
    "learned": ("position_offset",),
    "alibi": ("alibi_max",),
    "relative": (),
}
"""Fields that say more of one kind of positions."""

_COMMON = ("head_dim", "norm_eps", "rope_theta", "rope_scaling", "tied", "context", "public")
"""Fields with a default that every family has."""
