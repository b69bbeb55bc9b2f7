"""A sense more for the quickstart's model: features computed elsewhere, through a connector that trains alone.

Run:      lvlm train --config quickstart_senses --workdir runs/senses   (after lvlm train --config quickstart
          --workdir runs/quickstart, whose tower, connector and decoder it keeps bit for bit)
Hardware: two CPU cores, 2 GiB of memory
Measured: not yet

The features stand for those of sound or of a graph: 16 vectors of 6 values, mean and deviation of the colours of the
cells of easy-VQA's pictures (`data.easy_vqa.cells`), which no tower sees. One stage, `add`: the sense ``cells``, a slot
for features and a two-layer connector, learns to answer the questions; all else of the model is frozen. The pair is
shipped alone, and asked on top of any copy of the model:

    lvlm convert export runs/senses cells --part senses/cells
    lvlm generate runs/quickstart --sense cells --features cells=features.npy --prompt "what color is the shape?"
"""

from ml_collections import ConfigDict

from lvlm_jax.data.easy_vqa import CELLS

SENSE = "cells"
SIZE, PATCH, VOCAB = 64, 16, 35
"""The quickstart's."""


def get_config(arg: str = "") -> ConfigDict:
    """``quickstart_senses``, or ``quickstart_senses:tiny`` for a few steps on ``runs/tiny`` (``quickstart:tiny``)."""
    if arg not in ("", "tiny"):
        raise ValueError(f"quickstart_senses:{arg}: the only argument is 'tiny'")
    c = ConfigDict()
    c.name = "quickstart_senses"
    c.seed = 0
    c.mesh = "DP"
    c.run = ("add",)
    c.model = _model()
    rows = {"source": "easy_vqa", "sense": SENSE, "groups": 8, "pictures": 0}
    c.stages = ConfigDict()
    c.stages.add = {
        "trains": (f"senses/{SENSE}/**",),
        "steps": 1000,
        "optimizer": {"learning_rate": 3e-3, "b2": 0.98, "warmup": 100, "clip": 1.0},
        "data": {**rows, "of": "questions", "rows": 16, "length": 128, "senses": {SENSE: 64}},
        "start": {"all": {"workdir": "runs/quickstart"}},
        "evaluate": ("before", "after"),
        "log_every": 20,
        "save_every": 400,
    }
    c.evaluation = ConfigDict(
        {"data": {**rows, "split": "test", "length": 256}, "scores": ("exact",), "max_new_tokens": 8, "rows": 256}
    )
    if arg == "tiny":
        add = c.stages.add
        add.steps, add.save_every, add.log_every, add.optimizer.warmup = 4, 2, 1, 1
        add.start.all.workdir = "runs/tiny"
        c.evaluation.limit = 32
    return c


def _model() -> ConfigDict:
    """The quickstart's model, and the sense."""
    length, width = CELLS
    return ConfigDict(
        {
            "vision": {
                "image_size": SIZE,
                "patch_size": PATCH,
                "width": 64,
                "depth": 4,
                "heads": 2,
                "mlp_dim": 256,
                "activation": "gelu",
                "feature_layer": -1,
                "class_feature": True,
            },
            "connector": {"kind": "mlp", "activation": "gelu"},
            "llm": {
                "vocab": VOCAB,
                "width": 96,
                "depth": 3,
                "heads": 4,
                "kv_heads": 4,
                "mlp_dim": 256,
                "context": 256,
            },
            "senses": {
                SENSE: {
                    "encoder": {"length": length, "width": width},
                    "connector": {"kind": "mlp", "activation": "gelu"},
                },
            },
            "image": {"size": SIZE, "patch": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3, "fit": "squash"},
            "tokenizer": "easy_vqa",
            "template": "vicuna_v1",
            "system": "",
            "image_token_id": 4,
        }
    )
