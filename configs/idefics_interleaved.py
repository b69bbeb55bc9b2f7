"""Idefics 1: resampler, gated blocks and the new words, on OBELICS, Wikipedia, LAION and PMD.

Run:      lvlm train --config idefics_interleaved --workdir runs/idefics_9b
Hardware: planned for v5p-256, FSDP          Measured: not yet

Settings of the authors' model card (HuggingFaceM4/idefics-9b and -80b), and of OBELICS (arXiv 2306.16527):
- both towers frozen, what is new trained
- 200,000 steps of 1.31 M tokens (80B: 3.67 M) in rows of 1,024
- learning rate 1e-5 down to 6e-6 in a line (80B: 5e-5 to 3e-5), 2,000 steps of warm-up; Adam with b2 0.999, weight
  decay 0.1, gradients clipped to 1.0
- of the tokens 73.85 % from OBELICS, 6.15 % from Wikipedia, 17.18 % from LAION, 2.82 % from PMD. Here a share is one of
  the examples: a page has some 800 tokens, a caption 27 (LAION) or 23 (PMD), so the weights below give these shares
- a z-loss of 1e-3 of the logits

Data: Parquet of OBELICS (and of Wikipedia in its form) with the pictures fetched, shards of pairs for the others;
override stages.train.data.members. LLaMA's weights come by stages.train.start.llm.hub.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS

PAGES = {"source": "obelics", "template": "idefics"}


def get_config(arg: str = "") -> ConfigDict:
    """``idefics_interleaved`` (9B), or ``idefics_interleaved:80b``."""
    if arg not in ("", "9b", "80b"):
        raise ValueError(f"idefics_interleaved:{arg}: choose one of ['9b', '80b']")
    large = arg == "80b"
    spec = SYSTEMS["idefics_80b" if large else "idefics_9b"]
    c = ConfigDict()
    c.name = "idefics_interleaved"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("train",)
    c.model = model_of(spec)
    c.stages = ConfigDict()
    c.stages.train = {
        "trains": ("connector/**", "fusion/**", "words/**"),
        "settings": {"z_loss": 1e-3},
        "steps": 200000,
        "optimizer": {
            "learning_rate": 5e-5 if large else 1e-5,
            "schedule": "linear",
            "end_factor": 0.6,
            "warmup": 2000,
            "weight_decay": 0.1,
            "clip": 1.0,
        },
        "data": {
            "source": "mixture",
            "members": {
                "obelics": {**PAGES, "path": "data/obelics/*.parquet", "weight": 0.7385 / 800},
                "wikipedia": {**PAGES, "path": "data/wikipedia/*.parquet", "weight": 0.0615 / 800},
                "laion": {"source": "webdataset", "path": "data/laion2b/{00000..09999}.tar", "weight": 0.1718 / 27},
                "pmd": {"source": "webdataset", "path": "data/pmd/{0000..0999}.tar", "weight": 0.0282 / 23},
            },
            "rows": 3584 if large else 1280,
            "groups": 128,
            "length": 1024,
            "pictures": 35840 if large else 12800,
            "workers": 16,
            "on_bad": "skip",
        },
        "start": {
            "vision": {"hub": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
            "llm": {"hub": "huggyllama/llama-65b" if large else "huggyllama/llama-7b"},
        },
        "save_every": 1000,
    }
    return c
