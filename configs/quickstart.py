"""The whole story of a vision-language model on a laptop: two towers, alignment, instruction tuning.

Run:      lvlm train --config quickstart --workdir runs/quickstart
Hardware: two CPU cores, 2 GiB of memory
Measured: see the README

Pictures and questions are easy-VQA's (a pip package): 4,000 training pictures, 9,673 test questions. Stages:

1. vision:   a small ViT learns from captions that follow from the training questions (contrastive; the 24 different
             captions count every equal one as a positive).
2. language: a small decoder learns to answer from text alone, the caption standing where the picture will.
3. align:    both frozen; the connector alone learns to say the caption.
4. instruct: the decoder thaws and learns to answer about pictures.
"""

from ml_collections import ConfigDict

WIDTH, PATCH, SIZE = 96, 16, 64
VOCAB = 35
"""Words of easy-VQA with the special tokens (`data.easy_vqa.word_tokenizer`)."""


def get_config(arg: str = "") -> ConfigDict:
    """``quickstart``, or ``quickstart:tiny`` for a few steps of everything (tests, a look around)."""
    if arg not in ("", "tiny"):
        raise ValueError(f"quickstart:{arg}: the only argument is 'tiny'")
    c = ConfigDict()
    c.name = "quickstart"
    c.seed = 0
    c.mesh = "DP"
    c.run = ("vision", "language", "align", "instruct")
    c.model = _model()
    c.contrastive = ConfigDict(
        {
            "text": {
                "vocab": VOCAB,
                "width": 64,
                "depth": 2,
                "heads": 2,
                "mlp_dim": 256,
                "context": 8,
                "pool": "eos",
                "eos_id": 2,
            },
            "projection": 64,
        }
    )
    moved = {"flip": True, "shift": 4}
    adam = {"b2": 0.98, "warmup": 100, "clip": 1.0}
    rows = {"source": "easy_vqa", "rows": 16, "groups": 8, "length": 128}
    # A process of their own for pictures: threads would wait for the interpreter as often as they build.
    seen = {**rows, "pictures": 80, "workers": 1, "augment": moved}
    c.stages = ConfigDict()
    c.stages.vision = {
        "loss": "contrastive",
        "trains": ("**",),
        "steps": 3000,
        "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.05, **adam},
        "data": {
            "source": "easy_vqa",
            "of": "captions",
            "rows": 64,
            "groups": 8,
            "pictures": 64,
            "length": 8,
            "pack": False,
            "workers": 1,
            "augment": moved,
        },
    }
    c.stages.language = {
        "trains": ("llm/**",),
        "steps": 600,
        "optimizer": {"learning_rate": 2e-3, **adam},
        "data": {**rows, "of": "text"},
    }
    c.stages.align = {
        "trains": ("connector/**",),
        "steps": 400,
        "optimizer": {"learning_rate": 3e-3, **adam, "warmup": 40},
        "data": {**seen, "of": "partial_captions"},
        "start": {"vision": {"stage": "vision"}, "llm": {"stage": "language"}},
        "evaluate": ("before", "after"),
    }
    c.stages.instruct = {
        "trains": ("connector/**", "llm/**"),
        "steps": 1000,
        "optimizer": {"learning_rate": 1e-3, **adam},
        "data": {**seen, "of": "questions"},
        "start": {"all": {"stage": "align"}},
        "evaluate": ("after",),
    }
    c.evaluation = ConfigDict(
        {
            "data": {"source": "easy_vqa", "split": "test", "length": 256, "groups": 8, "pictures": 64},
            "scores": ("exact",),
            "max_new_tokens": 8,
            "rows": 256,
            "limit": 0,
        }
    )
    for stage in c.stages.values():
        stage.log_every = 20
        stage.save_every = 400
    if arg == "tiny":
        for stage in c.stages.values():
            stage.steps, stage.save_every, stage.log_every, stage.optimizer.warmup = 4, 2, 1, 1
            stage.data.workers = 0
        c.evaluation.limit = 32
    return c


def _model() -> ConfigDict:
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
                # All that the last block puts out, class token first: what the captions taught is there.
                "feature_layer": -1,
                "class_feature": True,
            },
            "connector": {"kind": "mlp", "activation": "gelu"},
            "llm": {
                "vocab": VOCAB,
                "width": WIDTH,
                "depth": 3,
                "heads": 4,
                "kv_heads": 4,
                "mlp_dim": 256,
                "context": 256,
            },
            "image": {"size": SIZE, "patch": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3, "fit": "squash"},
            "tokenizer": "easy_vqa",
            "template": "vicuna_v1",
            "system": "",
            "image_token_id": 4,
        }
    )
