"""Connectors between a vision tower and a language model."""

from lvlm_jax.connectors.merger import MergerConfig, Mergers
from lvlm_jax.connectors.perceiver import FLAMINGO, IDEFICS, IDEFICS2, PerceiverConfig, PerceiverResampler
from lvlm_jax.connectors.pooled import AveragePool, AveragePoolConfig, PixelShuffle, PixelShuffleConfig
from lvlm_jax.connectors.projectors import GatedConfig, GatedProjector, Linear, LinearConfig, MlpConfig, MlpProjector
from lvlm_jax.connectors.qformer import QFormer, QFormerConfig

CONNECTORS = {
    "linear": LinearConfig,
    "mlp": MlpConfig,
    "perceiver": PerceiverConfig,
    "pixel_shuffle": PixelShuffleConfig,
    "average_pool": AveragePoolConfig,
    "gated": GatedConfig,
    "qformer": QFormerConfig,
    "merger": MergerConfig,
}

ConnectorConfig = (
    LinearConfig
    | MlpConfig
    | GatedConfig
    | PerceiverConfig
    | PixelShuffleConfig
    | AveragePoolConfig
    | QFormerConfig
    | MergerConfig
)

__all__ = [
    "CONNECTORS",
    "FLAMINGO",
    "IDEFICS",
    "IDEFICS2",
    "AveragePool",
    "AveragePoolConfig",
    "ConnectorConfig",
    "GatedConfig",
    "GatedProjector",
    "Linear",
    "LinearConfig",
    "MergerConfig",
    "Mergers",
    "MlpConfig",
    "MlpProjector",
    "PerceiverConfig",
    "PerceiverResampler",
    "PixelShuffle",
    "PixelShuffleConfig",
    "QFormer",
    "QFormerConfig",
]
