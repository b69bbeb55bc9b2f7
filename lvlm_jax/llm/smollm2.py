"""SmolLM2: LLaMA's decoder at sizes that run anywhere; its public ``model_type`` is "llama".

Source: SmolLM2 (arXiv 2502.02737).
"""

from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig

rows, fits, from_hf, to_hf = llama.rows, llama.fits, llama.from_hf, llama.to_hf
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

_SMOLLM2 = {"vocab": 49152, "norm_eps": 1e-5, "tied": True, "context": 8192}

PRESETS: dict[str, DecoderConfig] = {
    "smollm2_135m": DecoderConfig(  # HuggingFaceTB/SmolLM2-135M
        **_SMOLLM2, width=576, depth=30, heads=9, kv_heads=3, mlp_dim=1536, rope_theta=100000.0
    ),
    "smollm2_360m": DecoderConfig(  # HuggingFaceTB/SmolLM2-360M
        **_SMOLLM2, width=960, depth=32, heads=15, kv_heads=5, mlp_dim=2560, rope_theta=100000.0
    ),
    "smollm2_1.7b": DecoderConfig(  # HuggingFaceTB/SmolLM2-1.7B
        **_SMOLLM2, width=2048, depth=24, heads=32, kv_heads=32, mlp_dim=8192, rope_theta=130000.0
    ),
}
"""Decoders, each from the config.json of the release named beside it."""
