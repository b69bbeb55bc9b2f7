"""Builds the API reference from the docstrings: python docs/reference.py FOLDER."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import lvlm_jax


def modules() -> list[str]:
    """Every module but the recipes. pdoc itself leaves out those that a package's ``__all__`` does not name."""
    found = (module.name for module in pkgutil.walk_packages(lvlm_jax.__path__, "lvlm_jax."))
    return ["lvlm_jax", *(name for name in found if not name.startswith("lvlm_jax.configs"))]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="The module specification .* already been added", category=UserWarning)
    pdoc.pdoc(*modules(), "!lvlm_jax.configs", output_directory=Path(sys.argv[1]))
