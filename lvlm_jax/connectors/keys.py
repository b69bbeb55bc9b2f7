"""Checkpoint keys and config values of the connectors.

The dense projectors, the pixel shuffle (Idefics 3, SmolVLM), the average pool (Gemma 3), the Q-Former (BLIP-2) and the
patch merger (Qwen-VL) carry the torch library's names, the gated projector CogVLM's. A resampler in a LLaVA has no
public counterpart: its keys are our own, in the same style, under the same prefix.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax.connectors import (
    CONNECTORS,
    AveragePoolConfig,
    ConnectorConfig,
    GatedConfig,
    LinearConfig,
    MergerConfig,
    MlpConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    QFormerConfig,
    qformer,
)
from lvlm_jax.keymap import Row, dense, layer_norm, one_of

QWEN2_MERGER = ("ln_q", "mlp.0", "mlp.2")
"""Names of a patch merger's norm and dense layers in Qwen2-VL and Qwen2.5-VL."""

QWEN3_MERGER = ("norm", "linear_fc1", "linear_fc2")
"""The same in Qwen3-VL."""


def linear_rows(config: LinearConfig, ours: str, theirs: str) -> list[Row]:
    """One dense layer."""
    return dense(f"{ours}/linear_1", f"{theirs}.linear_1", bias=True)


def mlp_rows(config: MlpConfig, ours: str, theirs: str) -> list[Row]:
    """Two dense layers."""
    return [row for name in ("linear_1", "linear_2") for row in dense(f"{ours}/{name}", f"{theirs}.{name}", bias=True)]


def gated_rows(config: GatedConfig, ours: str, theirs: str) -> list[Row]:
    """CogVLM's `linear_proj`."""
    names = {"gate": "gate_proj", "up": "dense_h_to_4h", "down": "dense_4h_to_h"}
    return [
        *dense(f"{ours}/linear_1", f"{theirs}.linear_proj"),
        *layer_norm(f"{ours}/norm", f"{theirs}.norm1"),
        *(row for x, y in names.items() for row in dense(f"{ours}/mlp/{x}", f"{theirs}.{y}")),
    ]


def perceiver_rows(config: PerceiverConfig, ours: str, theirs: str) -> list[Row]:
    """The resampler, then one dense layer where there is one."""
    a, b = f"{ours}/resampler", f"{theirs}.resampler"
    out = [Row(f"{a}/latents", f"{b}.latents")]
    for i in range(config.depth):
        x, y = f"{a}/layers/{i}", f"{b}.layers.{i}"
        for name in ("norm_latents", "norm_context", "norm_mlp"):
            out += _norm(config.norm, f"{x}/{name}", f"{y}.{name}")
        for name in ("q", "k", "v", "o"):
            out += dense(f"{x}/attn/{name}", f"{y}.attn.{name}_proj")
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            out += _norm(config.qk_norm, f"{x}/attn/{name}", f"{y}.attn.{name}")
        for name in ("gate", "up", "down") if config.gated else ("up", "down"):
            out += dense(f"{x}/mlp/{name}", f"{y}.mlp.{name}_proj")
    out += _norm(config.norm, f"{a}/norm", f"{b}.norm")
    return out + (dense(f"{ours}/linear_1", f"{theirs}.linear_1", bias=True) if config.project else [])


def _norm(kind: str, ours: str, theirs: str) -> list[Row]:
    """A layer norm, or an RMS norm, which has no bias."""
    return layer_norm(ours, theirs) if kind == "layer" else [Row(f"{ours}/scale", f"{theirs}.weight")]


def pixel_shuffle_rows(config: PixelShuffleConfig, ours: str, theirs: str) -> list[Row]:
    """One dense layer, under the name that Idefics 3 and SmolVLM give it."""
    return dense(f"{ours}/linear_1", f"{theirs}.modality_projection.proj", bias=config.bias)


def average_pool_rows(config: AveragePoolConfig, ours: str, theirs: str) -> list[Row]:
    """A norm and a matrix, which Gemma 3 keeps [in, out] as we do."""
    return [
        Row(f"{ours}/norm/scale", f"{theirs}.mm_soft_emb_norm.weight"),
        Row(f"{ours}/linear_1/kernel", f"{theirs}.mm_input_projection_weight"),
    ]


def qformer_rows(config: QFormerConfig, ours: str, theirs: str) -> list[Row]:
    """The Q-Former with its queries, then one dense layer, as BLIP-2 names them, and InstructBLIP one with text."""
    layout = "blip_2" if config.vocab is None else "instructblip"
    out = qformer.rows(config, f"{ours}/qformer", f"{theirs}.", layout)
    return out + dense(f"{ours}/linear_1", f"{theirs}.language_projection", bias=True)


def merger_rows(config: MergerConfig, ours: str, theirs: str, names: tuple[str, str, str] = QWEN3_MERGER) -> list[Row]:
    """A merger and those of tapped layers; `names` of its norm and its two dense layers differ between releases."""
    out = _merger(config.norm, f"{ours}/merger", f"{theirs}.merger.", names)
    for i in range(config.taps):
        out += _merger(config.norm, f"{ours}/taps_{i}", f"{theirs}.deepstack_merger_list.{i}.", names)
    return out


def _merger(kind: str, ours: str, theirs: str, names: tuple[str, str, str]) -> list[Row]:
    norm, first, second = (theirs + name for name in names)
    dense_rows = dense(f"{ours}/linear_1", first, bias=True) + dense(f"{ours}/linear_2", second, bias=True)
    return _norm(kind, f"{ours}/norm", norm) + dense_rows


ROWS = {
    LinearConfig: linear_rows,
    MlpConfig: mlp_rows,
    GatedConfig: gated_rows,
    PerceiverConfig: perceiver_rows,
    PixelShuffleConfig: pixel_shuffle_rows,
    AveragePoolConfig: average_pool_rows,
    QFormerConfig: qformer_rows,
    MergerConfig: merger_rows,
}


def rows(config: ConnectorConfig, ours: str = "connector", theirs: str = "multi_modal_projector") -> list[Row]:
    """The key table of a connector; `theirs` without its closing dot."""
    return ROWS[type(config)](config, ours, theirs)


def original_rows(config: ConnectorConfig, ours: str = "connector", theirs: str = "model.mm_projector") -> list[Row]:
    """The key table in the LLaVA authors' own naming, which numbers the layers of an MLP and not a single one."""
    if isinstance(config, LinearConfig):
        return dense(f"{ours}/linear_1", theirs, bias=True)
    if isinstance(config, MlpConfig):
        return dense(f"{ours}/linear_1", f"{theirs}.0", bias=True) + dense(f"{ours}/linear_2", f"{theirs}.2", bias=True)
    kind = next(name for name, cls in CONNECTORS.items() if isinstance(config, cls))
    raise ValueError(
        f"the LLaVA authors' layout has no {kind} connector between tower and language model; choose another layout"
    )


def from_dict(values: Mapping[str, Any]) -> ConnectorConfig:
    """A config from the ``connector`` entry of a config.json of ours.

    Raises:
      ValueError: a kind or field that does not exist.
    """
    values = dict(values)
    kind = CONNECTORS[one_of("connector.kind", values.pop("kind", None), CONNECTORS)]
    for name in values:
        one_of("connector field", name, [field.name for field in dataclasses.fields(kind)])
    return kind(**values)


def to_dict(config: ConnectorConfig) -> dict[str, Any]:
    """The ``connector`` entry of a config.json of ours; `from_dict` reads it back."""
    kind = next(name for name, cls in CONNECTORS.items() if isinstance(config, cls))
    return {"kind": kind, **dataclasses.asdict(config)}
