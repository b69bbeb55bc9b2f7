"""Compiles a recipe's programs for devices nobody holds, and says what they would take there."""

from lvlm_jax.config import ConfigError


class NoCompiler(ConfigError):
    """No compiler for such devices is installed; what there is without one is arithmetic."""
