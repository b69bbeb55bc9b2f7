"""LLaVA-NeXT (LLaVA 1.6) stage 2: visual instruction tuning on pictures of any resolution, everything trained.

Run:      lvlm train --config llavanext_instruct --workdir runs/llavanext_instruct
Hardware: planned for v5p-64 or 32 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (their post of January 2024, and scripts/train in LLaVA-VL/LLaVA-NeXT): vision tower,
projector, newline and language model all trained, learning rate 1e-5 and 2e-6 for the tower, cosine with 3 % warm-up,
no weight decay, batch 128, one epoch of 760 K samples (760,000 / 128 = 5,938 steps), 4,096 positions, tiles by the five
released grids. Theirs pads each conversation; here conversations are packed: a picture takes 1,200 to 2,928 positions,
so that 96 rows of 4,096 hold about 128 of them.

Data: their 760K mix was not released whole; any LLaVA JSON with its pictures will do: override
stages.instruct.data.path and .images. Vision rows count tiles: 15 for three text rows hold three to five pictures.
Stage 1 is LLaVA-1.5's: the projector comes from the end of a llava15_align run; override
stages.instruct.start.connector.workdir. Vicuna's repository holds pickle files; see llava15_align.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``llavanext_instruct`` (Vicuna 7B) or ``llavanext_instruct:13b``."""
    systems = {"": "llavanext_7b", "7b": "llavanext_7b", "13b": "llavanext_13b"}
    if arg not in systems:
        raise ValueError(f"llavanext_instruct:{arg}: choose one of {[name for name in systems if name]}")
    c = ConfigDict()
    c.name = "llavanext_instruct"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("instruct",)
    c.model = model_of(SYSTEMS[systems[arg]])
    c.stages = ConfigDict()
    c.stages.instruct = {
        "trains": ("vision/**", "connector/**", "newline/**", "llm/**"),
        "steps": 5938,
        "optimizer": {
            "learning_rate": 1e-5,
            "lr_of": (("vision/**", 2e-6),),
            "schedule": "cosine",
            "warmup": 0.03,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "data": {
            "source": "llava_json",
            "path": "data/LLaVA-NeXT-Data/llava_next.json",
            "images": "data/LLaVA-NeXT-Data",
            "rows": 96,
            "groups": 32,
            "length": 4096,
            "pictures": 480,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {
            "vision": {"hub": "openai/clip-vit-large-patch14-336"},
            "llm": {"hub": f"lmsys/vicuna-{'13b' if arg == '13b' else '7b'}-v1.5"},
            "connector": {"workdir": "runs/llava15_align"},
        },
        "save_every": 500,
    }
    return c
