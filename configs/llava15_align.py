"""LLaVA-1.5 stage 1: align the projector.

Run:      lvlm train --config llava15_align --workdir runs/llava15_align
Hardware: planned for v5p-64 or 8 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (scripts/v1_5/pretrain.sh of haotian-liu/LLaVA): CLIP ViT-L/14-336 and Vicuna-7B-v1.5
frozen, a two-layer MLP trained on the 558K caption pairs, batch 256, learning rate 1e-3, cosine with 3 % warm-up, no
weight decay, one epoch (558,128 / 256 = 2,181 steps). Theirs pads each pair; here 64 rows of 2,432 positions hold about
four pairs each (576 visual tokens and a short caption), so that a step still sees about 256.

Data: LLaVA-Pretrain's blip_laion_cc_sbu_558k.json with its images folder; override stages.align.data.path and .images.
Vicuna's repository holds pickle files: load it once in the torch library and save_pretrained(..., safe_serialization)
to a folder, and override stages.align.start.llm.hub with that folder.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``llava15_align`` (7B) or ``llava15_align:13b``; ``:perceiver`` puts a Perceiver resampler between."""
    systems = {"": "llava15_7b", "7b": "llava15_7b", "13b": "llava15_13b", "perceiver": "llava15_7b_perceiver"}
    if arg not in systems:
        raise ValueError(f"llava15_align:{arg}: choose one of {[name for name in systems if name]}")
    c = ConfigDict()
    c.name = "llava15_align"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("align",)
    c.model = model_of(SYSTEMS[systems[arg]])
    c.model.image.fit = "crop"  # their first stage does not pad to a square; the second does
    c.stages = ConfigDict()
    c.stages.align = {
        "trains": ("connector/**",),
        "steps": 2181,
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0},
        "data": {
            "source": "llava_json",
            "path": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
            "images": "data/LLaVA-Pretrain/images",
            "template": "plain",
            "rows": 64,
            "groups": 64,
            "length": 2432,
            "pictures": 256,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {
            "vision": {"hub": "openai/clip-vit-large-patch14-336"},
            "llm": {"hub": f"lmsys/vicuna-{'13b' if arg == '13b' else '7b'}-v1.5"},
        },
        "save_every": 500,
    }
    return c
