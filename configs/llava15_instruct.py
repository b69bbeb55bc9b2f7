"""LLaVA-1.5 stage 2: visual instruction tuning.

Run:      lvlm train --config llava15_instruct --workdir runs/llava15_instruct
Hardware: planned for v5p-64 or 8 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (scripts/v1_5/finetune.sh of haotian-liu/LLaVA): the vision tower frozen, projector and
language model trained on the 665K mix, batch 128, learning rate 2e-5, cosine with 3 % warm-up, no weight decay, one
epoch (665,298 / 128 = 5,198 steps), 2,048 positions. Theirs pads each conversation; here conversations are packed, 64
rows a step, which hold about as many of them.

Data: llava_v1_5_mix665k.json with coco, gqa, ocr_vqa, textvqa and vg beside it; override stages.instruct.data.path and
.images. It starts from the end of a llava15_align run: override stages.instruct.start.all.workdir.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``llava15_instruct`` (7B) or ``llava15_instruct:13b``; ``:perceiver`` as in llava15_align.

    ``:full`` (7B) trains the vision tower too, at the same rate.
    """
    systems = {
        "": "llava15_7b",
        "7b": "llava15_7b",
        "13b": "llava15_13b",
        "perceiver": "llava15_7b_perceiver",
        "full": "llava15_7b",
    }
    if arg not in systems:
        raise ValueError(f"llava15_instruct:{arg}: choose one of {[name for name in systems if name]}")
    c = ConfigDict()
    c.name = "llava15_instruct"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("instruct",)
    c.model = model_of(SYSTEMS[systems[arg]])
    c.stages = ConfigDict()
    c.stages.instruct = {
        "trains": ("vision/**", "connector/**", "llm/**") if arg == "full" else ("connector/**", "llm/**"),
        "steps": 5198,
        "optimizer": {"learning_rate": 2e-5, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0},
        "data": {
            "source": "llava_json",
            "path": "data/LLaVA-Instruct/llava_v1_5_mix665k.json",
            "images": "data/LLaVA-Instruct",
            "rows": 64,
            "groups": 64,
            "length": 2048,
            "pictures": 192,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {"all": {"workdir": "runs/llava15_align"}},
        "save_every": 500,
    }
    return c
