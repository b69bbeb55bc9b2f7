"""Connectors between a vision tower and a language model."""

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
}

ConnectorConfig = (
    LinearConfig | MlpConfig | GatedConfig | PerceiverConfig | PixelShuffleConfig | AveragePoolConfig | QFormerConfig
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
    "MlpConfig",
    "MlpProjector",
    "PerceiverConfig",
    "PerceiverResampler",
    "PixelShuffle",
    "PixelShuffleConfig",
    "QFormer",
    "QFormerConfig",
]
