"""Chameleon's and Janus's picture tokenizers (VQGAN): sizes, checkpoint keys, config.json.

Source: Make-A-Scene (arXiv 2203.13131), Chameleon (arXiv 2405.09818), Janus (arXiv 2410.13848). Keys are those of the
torch library's `ChameleonVQVAE` and `JanusVQVAE`. Chameleon's class has no decoder; its decoder's keys are those of the
authors' own file, ``vqgan.ckpt``.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from lvlm_jax.keymap import CONV, Row, fields, layer_norm, one_of
from lvlm_jax.vision.vq import VQConfig

PRESETS: dict[str, VQConfig] = {
    # facebook/chameleon-7b, its vq_config; the weights of its decoder stand in the authors' own vqgan.ckpt
    "chameleon_vq": VQConfig(
        image_size=512,
        channels=128,
        multipliers=(1, 1, 2, 2, 4),
        codes=8192,
        code_width=256,
        latent=256,
        decoder=False,
    ),
    # deepseek-community/Janus-Pro-1B, its vq_config
    "janus_vq": VQConfig(
        image_size=384,
        channels=128,
        multipliers=(1, 1, 2, 2, 4),
        codes=16384,
        code_width=8,
        latent=256,
        attention=(24,),
        unit_codes=True,
    ),
}
"""Picture tokenizers, each from the config.json of the release named beside it."""

Public = Literal["chameleon_vqgan", "janus_vqgan"]
"""The public ``model_type`` of a picture tokenizer."""

TYPES: tuple[str, ...] = get_args(Public)


def fits(config: VQConfig) -> Public | None:
    """The public ``model_type`` that holds this tokenizer; None where none does."""
    if config.groups != 32:
        return None
    if not config.decoder and not config.unit_codes and (config.middle_attention or not config.attention):
        return "chameleon_vqgan"
    lowest = config.attention == config.sides[-1:] and config.middle_attention
    return "janus_vqgan" if config.decoder and config.unit_codes and lowest else None


def _conv(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{theirs}.weight", CONV), Row(f"{ours}/bias", f"{theirs}.bias")]


def _block(ours: str, theirs: str, widened: bool = False) -> list[Row]:
    out = [row for i in (1, 2) for row in layer_norm(f"{ours}/norm{i}", f"{theirs}.norm{i}")]
    out += [row for i in (1, 2) for row in _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")]
    return out + (_conv(f"{ours}/shortcut", f"{theirs}.nin_shortcut") if widened else [])


def _attention(ours: str, theirs: str) -> list[Row]:
    out = layer_norm(f"{ours}/norm", f"{theirs}.norm")
    for x, y in {"q": "q", "k": "k", "v": "v", "o": "proj_out"}.items():
        out += _conv(f"{ours}/{x}", f"{theirs}.{y}")
    return out


def _half(config: VQConfig, ours: str, theirs: str, levels: list[tuple[str, str, int, int]], blocks: int) -> list[Row]:
    """Encoder or decoder: levels as (ours, theirs, level, channels that come in)."""
    out = [row for x in ("conv_in", "conv_out") for row in _conv(f"{ours}/{x}", f"{theirs}.{x}")]
    out += layer_norm(f"{ours}/norm_out", f"{theirs}.norm_out")
    for i in (1, 2):
        out += _block(f"{ours}/middle/block_{i}", f"{theirs}.mid.block_{i}")
    if config.middle_attention:
        out += _attention(f"{ours}/middle/attn_1", f"{theirs}.mid.attn_1")
    for a, b, level, incoming in levels:
        for j in range(blocks):
            widened = j == 0 and incoming != config.channels * config.multipliers[level]
            out += _block(f"{ours}/{a}/block_{j}", f"{theirs}.{b}.block.{j}", widened)
            if config.sides[level] in config.attention:
                out += _attention(f"{ours}/{a}/attn_{j}", f"{theirs}.{b}.attn.{j}")
    return out


def rows(config: VQConfig, ours: str = "vq", theirs: str = "", public: Public = "chameleon_vqgan") -> list[Row]:
    """The key table of a tokenizer.

    Args:
      ours: path of its parameters ("" for a tokenizer alone).
      theirs: prefix of its keys, e.g. ``model.vqmodel.``
      public: whose keys: the decoder's levels are numbered from the finest on in the authors' files (and so beside
        Chameleon's keys), from the coarsest on in Janus's class.
    """
    base = f"{ours}/" if ours else ""
    widths = [config.channels * times for times in config.multipliers]
    last = len(widths) - 1
    incoming = [config.channels, *widths]
    down = [(f"down_{i}", f"down.{i}", i, incoming[i]) for i in range(len(widths))]
    out = _half(config, f"{base}encoder", f"{theirs}encoder", down, config.blocks)
    for i in range(last):
        out += _conv(f"{base}encoder/downsample_{i}/conv", f"{theirs}encoder.down.{i}.downsample.conv")
    out += _conv(f"{base}to_code", f"{theirs}quant_conv") + _conv(f"{base}from_code", f"{theirs}post_quant_conv")
    out.append(Row(f"{base}codebook", f"{theirs}quantize.embedding.weight"))
    if not config.decoder:
        return out
    at = {i: last - i if public == "janus_vqgan" else i for i in range(len(widths))}
    up = [(f"up_{i}", f"up.{at[i]}", i, widths[min(i + 1, last)]) for i in range(len(widths))]
    out += _half(config, f"{base}decoder", f"{theirs}decoder", up, config.blocks + 1)
    for i in range(1, len(widths)):
        out += _conv(f"{base}decoder/upsample_{i}/conv", f"{theirs}decoder.up.{at[i]}.upsample.conv")
    return out


DEFAULTS = {
    "embed_dim": 256,
    "num_embeddings": 8192,
    "double_latent": False,
    "latent_channels": 256,
    "resolution": 512,
    "in_channels": 3,
    "out_channels": 3,
    "base_channels": 128,
    "channel_multiplier": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "attn_resolutions": (),
    "dropout": 0.0,
}
"""What Chameleon's class assumes for fields that a config leaves out."""

JANUS_DEFAULTS = {**DEFAULTS, "embed_dim": 8, "num_embeddings": 16384, "num_patches": 32}
"""The same of Janus's class."""


def from_hf(config: Mapping[str, Any]) -> VQConfig:
    """A public config (``vq_config`` of a larger one, or a tokenizer's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    kind = one_of("model_type", config.get("model_type", "chameleon_vqgan"), TYPES)
    janus = kind == "janus_vqgan"
    f = fields(config, JANUS_DEFAULTS if janus else DEFAULTS)
    for name, only in {"double_latent": False, "in_channels": 3, "out_channels": 3, "dropout": 0.0}.items():
        one_of(name, f[name], [only])
    attends = one_of("attn_type", config.get("attn_type") or "vanilla", ["vanilla", "none"]) == "vanilla"
    multipliers = tuple(f["channel_multiplier"])
    side = f["num_patches"] << (len(multipliers) - 1) if janus else f["resolution"]
    attention = (f["num_patches"],) if janus else tuple(f["attn_resolutions"])
    # A level that the class does not reach has no attention, whatever its list says.
    reached = [side >> level for level in range(len(multipliers))]
    return VQConfig(
        image_size=side,
        channels=f["base_channels"],
        multipliers=multipliers,
        codes=f["num_embeddings"],
        code_width=f["embed_dim"],
        latent=f["latent_channels"],
        blocks=f["num_res_blocks"],
        attention=tuple(x for x in attention if x in reached) if attends else (),
        middle_attention=attends,
        decoder=janus,
        unit_codes=janus,
    )


def to_hf(config: VQConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back.

    Raises:
      ValueError: no public class holds this tokenizer.
    """
    kind = fits(config)
    if kind is None:
        raise ValueError(
            f"no public class holds a picture tokenizer with decoder={config.decoder}, unit_codes={config.unit_codes}, "
            f"attention={config.attention} and groups={config.groups}; Chameleon's has no decoder, Janus's has one, "
            "codes of length one and attention at the coarsest side, and both have 32 groups"
        )
    out = {
        "model_type": kind,
        "base_channels": config.channels,
        "channel_multiplier": list(config.multipliers),
        "num_embeddings": config.codes,
        "embed_dim": config.code_width,
        "latent_channels": config.latent,
        "num_res_blocks": config.blocks,
        "in_channels": 3,
        "double_latent": False,
        "dropout": 0.0,
    }
    if kind == "janus_vqgan":
        return {**out, "architectures": ["JanusVQVAE"], "num_patches": config.grid, "out_channels": 3}
    return {
        **out,
        "architectures": ["ChameleonVQVAE"],
        "resolution": config.image_size,
        "attn_resolutions": list(config.attention) or None,
        "attn_type": "vanilla" if config.middle_attention else "none",
    }
