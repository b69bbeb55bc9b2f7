"""LLaVA-OneVision stage 1.5: high-quality knowledge, everything trained, pictures in up to four tiles.

Run:      lvlm train --config llava_onevision_mid --workdir runs/llava_onevision_mid
Hardware: planned for v5p-128 or 64 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them: scripts/train/direct_finetune_siglip_a4.sh of LLaVA-VL/LLaVA-NeXT, and config.json of
lmms-lab/llava-onevision-qwen2-0.5b-mid-stage-a4, which this stage left: vision tower, projector, newline and language
model trained (--mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model), learning rate 1e-5 and 2e-6 for the
tower (--mm_vision_tower_lr), cosine, --warmup_ratio 0.03, --weight_decay 0, one epoch, --version qwen_1_5, tiles by
--image_aspect_ratio anyres and five grids of at most four tiles (so 729 positions five times, and newlines),
--mm_patch_merge_type spatial_unpad. Data: 4 M samples (docs/LLaVA_OneVision.md; scripts/train/mid_stage.yaml lists
them, one file of which is not released). The script has four conversations a GPU and
does not say how many GPUs: a batch of 256 is taken, which their later stages run. Theirs pads each conversation; here
64 rows of 16,384 positions hold about four each.

The authors also learn each line break and the two marks of every turn, the user's too (preprocess_qwen of
llava/train/train.py); here the answers and their <|im_end|> are learnt.

Stage 1's projector: override stages.mid.start.connector.workdir.
"""

import dataclasses

from ml_collections import ConfigDict

from lvlm_jax.processing.frames import DEFAULT
from lvlm_jax.processing.tiles import Tiles
from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS

# (height, width); theirs are [[384, 768], [768, 384], ...], width first, and hold the same sizes.
PINPOINTS = ((768, 384), (384, 768), (768, 768), (384, 1152), (1152, 384))


def get_config(arg: str = "") -> ConfigDict:
    """``llava_onevision_mid`` (7B), ``:0.5b``, ``:72b``."""
    sizes = ("0.5b", "7b", "72b")
    if arg not in ("", *sizes):
        raise ValueError(f"llava_onevision_mid:{arg}: choose one of {list(sizes)}")
    size = arg or "7b"
    spec = SYSTEMS[f"llava_onevision_{size.replace('.', '_')}_si"]
    plain = dataclasses.replace(spec.config, public=None)
    image = dataclasses.replace(spec.image, tiles=Tiles(pinpoints=PINPOINTS))
    c = ConfigDict()
    c.name = "llava_onevision_mid"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("mid",)
    c.model = model_of(dataclasses.replace(spec, config=plain, image=image, video=DEFAULT))
    c.stages = ConfigDict()
    c.stages.mid = {
        "trains": ("vision/**", "connector/**", "newline/**", "llm/**"),
        "steps": 15625,  # 4,000,000 / 256
        "optimizer": {
            "learning_rate": 1e-5,
            "lr_of": (("vision/**", 2e-6),),
            "schedule": "cosine",
            "warmup": 0.03,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "data": {
            "source": "llava_yaml",
            "path": "data/LLaVA-OneVision-Mid-Data/mid_stage.yaml",
            "images": "data/LLaVA-OneVision-Mid-Data",
            "rows": 64,
            "groups": 64,
            "length": 16384,
            "pictures": 1536,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {
            "vision": {"hub": "google/siglip-so400m-patch14-384"},
            "llm": {"hub": f"Qwen/Qwen2-{size.upper()}-Instruct"},
            "connector": {"workdir": "runs/llava_onevision_align"},
        },
        "save_every": 1000,
    }
    return c
