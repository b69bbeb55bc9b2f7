"""Checkpoints on disk: Orbax arrays in one layout, beside a manifest that says what is whole.

`Checkpoints` are the numbered ones of a stage (`steps`), `save_params` and `load_params` hold a whole model's weights
(`weights`). Both write trees as `layout` says, and are finished, and found damaged, by `manifest`.
"""

from lvlm_jax.checkpoint.layout import by_path, fingerprints, to_disk
from lvlm_jax.checkpoint.manifest import CheckpointError, damage, is_saved
from lvlm_jax.checkpoint.steps import Checkpoints
from lvlm_jax.checkpoint.weights import load_params, save_params, saved_fingerprints, saved_shapes

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "by_path",
    "damage",
    "fingerprints",
    "is_saved",
    "load_params",
    "save_params",
    "saved_fingerprints",
    "saved_shapes",
    "to_disk",
]
