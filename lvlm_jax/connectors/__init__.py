"""Connectors between a vision tower and a language model."""

from lvlm_jax.connectors.perceiver import FLAMINGO, IDEFICS, IDEFICS2, PerceiverConfig, PerceiverResampler
from lvlm_jax.connectors.projectors import Linear, LinearConfig, MlpConfig, MlpProjector

CONNECTORS = {"linear": LinearConfig, "mlp": MlpConfig, "perceiver": PerceiverConfig}

__all__ = [
    "CONNECTORS",
    "FLAMINGO",
    "IDEFICS",
    "IDEFICS2",
    "Linear",
    "LinearConfig",
    "MlpConfig",
    "MlpProjector",
    "PerceiverConfig",
    "PerceiverResampler",
]
