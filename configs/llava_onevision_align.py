"""LLaVA-OneVision stage 1: align the projector.

Run:      lvlm train --config llava_onevision_align --workdir runs/llava_onevision_align
Hardware: planned for v5p-64 or 32 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (scripts/train/pretrain_siglip.sh of LLaVA-VL/LLaVA-NeXT, line by line): SigLIP-So400m
at 384 pixels without its last block (llava/model/multimodal_encoder/siglip_encoder.py) and Qwen2 frozen, a two-layer
MLP (--mm_projector_type mlp2x_gelu, --mm_tunable_parts mm_mlp_adapter) trained on the 558K caption pairs (--data_path
blip_558k_plain.json, --version plain), learning rate 1e-3, cosine, --warmup_ratio 0.03, --weight_decay 0, one epoch.
Pictures are squashed to a square and take 729 positions: no tiles, no newline (--image_aspect_ratio is left out, whose
default is "square"). The script has 16 pairs a GPU and does not say how many GPUs: the batch of 512 is that of 32.
Theirs pads each pair; here 128 rows of 3,200 positions hold about four pairs each.

Data: as llava15_align: override stages.align.data.path and .images.
"""

import dataclasses

from ml_collections import ConfigDict

from lvlm_jax.processing.frames import DEFAULT
from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``llava_onevision_align`` (7B), ``:0.5b``, ``:72b``."""
    sizes = ("0.5b", "7b", "72b")
    if arg not in ("", *sizes):
        raise ValueError(f"llava_onevision_align:{arg}: choose one of {list(sizes)}")
    size = arg or "7b"
    spec = SYSTEMS[f"llava_onevision_{size.replace('.', '_')}_si"]
    plain = dataclasses.replace(spec.config, newline=False, public=None)
    image = dataclasses.replace(spec.image, tiles=None)
    c = ConfigDict()
    c.name = "llava_onevision_align"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("align",)
    c.model = model_of(dataclasses.replace(spec, config=plain, image=image, video=DEFAULT))
    c.stages = ConfigDict()
    c.stages.align = {
        "trains": ("connector/**",),
        "steps": 1091,  # 558,128 / 512
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0},
        "data": {
            "source": "llava_json",
            "path": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
            "images": "data/LLaVA-Pretrain/images",
            "template": "plain",
            "rows": 128,
            "groups": 64,
            "length": 3200,
            "pictures": 512,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {
            "vision": {"hub": "google/siglip-so400m-patch14-384"},
            "llm": {"hub": f"Qwen/Qwen2-{size.upper()}-Instruct"},
        },
        "save_every": 500,
    }
    return c
