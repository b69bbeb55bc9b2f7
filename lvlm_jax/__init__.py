"""Large vision-language models in JAX: train, fine-tune, evaluate, run.

Importing this package touches no backend, flag, environment variable or network.
"""

from collections.abc import Callable
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

load: Callable[..., Any]
"""`lvlm_jax.api.load`, imported when it is first asked for: ``lvlm_jax.load("runs/quickstart").generate(...)``."""


def __getattr__(name: str) -> Any:
    if name == "load":
        from lvlm_jax.api import load

        return load
    raise AttributeError(f"module 'lvlm_jax' has no attribute {name!r}")
