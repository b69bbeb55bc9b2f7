"""LLaVA-OneVision stage 2: single pictures, then pictures, several pictures and videos together; everything trained.

Run:      lvlm train --config llava_onevision_instruct --workdir runs/llava_onevision_instruct
Hardware: planned for v5p-128 or 64 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (scripts/train/finetune_si.sh and finetune_ov.sh of LLaVA-VL/LLaVA-NeXT): vision tower,
projector, newline and language model trained (--mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model),
learning rate 1e-5 and 2e-6 for the tower (--mm_vision_tower_lr), cosine, --warmup_ratio 0.03, --weight_decay 0, one
epoch each, --version qwen_1_5, --image_aspect_ratio anyres_max_9 with grids "(1x1),...,(6x6)", --mm_patch_merge_type
spatial_unpad, --model_max_length 32768, --frames_upbound 32. Batch 256: "for 7b model we recommend bs=1, accum=2, 16
nodes, 128 gpus, for 72b bs=1, accum=1, 32 nodes, 256 gpus" (their comment). Stage "single" sees 3.2 M samples
(scripts/train/single_image.yaml), stage "onevision" 1.6 M (onevision.yaml), by docs/LLaVA_OneVision.md. Theirs pads
each conversation; here 64 rows of 32,768 positions hold about four each: a picture takes 1,500 to 8,800, a video up
to 6,273.

Of a video one frame a second is taken, and 32 evenly where those are more (llava/utils.py, --frames_upbound); to ask
the model, their tutorial takes 16 evenly. One difference: the authors also learn each line break and the two marks of
every turn (see llava_onevision_mid).

Stage 1.5's weights: override stages.single.start.all.workdir. Vision rows count tiles and frames: a picture has at most
37, a video 32; 160 for each text row.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``llava_onevision_instruct`` (7B), ``:0.5b``, ``:72b``."""
    sizes = ("0.5b", "7b", "72b")
    if arg not in ("", *sizes):
        raise ValueError(f"llava_onevision_instruct:{arg}: choose one of {list(sizes)}")
    size = arg or "7b"
    c = ConfigDict()
    c.name = "llava_onevision_instruct"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("single", "onevision")
    c.model = model_of(SYSTEMS[f"llava_onevision_{size.replace('.', '_')}_ov"])
    c.model.video.sampler = "every"
    c.model.video.fps = 1.0
    optimizer = {
        "learning_rate": 1e-5,
        "lr_of": (("vision/**", 2e-6),),
        "schedule": "cosine",
        "warmup": 0.03,
        "weight_decay": 0.0,
        "clip": 1.0,
    }
    data = {
        "source": "llava_yaml",
        "images": "data/LLaVA-OneVision-Data",
        "rows": 64,
        "groups": 64,
        "length": 32768,
        "pictures": 10240,
        "workers": 8,
        "on_bad": "skip",
    }
    same = {"trains": ("vision/**", "connector/**", "newline/**", "llm/**"), "optimizer": optimizer, "save_every": 1000}
    c.stages = ConfigDict()
    c.stages.single = {
        **same,
        "steps": 12500,  # 3,200,000 / 256
        "data": {**data, "path": "data/LLaVA-OneVision-Data/single_image.yaml"},
        "start": {"all": {"workdir": "runs/llava_onevision_mid"}},
    }
    c.stages.onevision = {
        **same,
        "steps": 6250,  # 1,600,000 / 256
        "data": {**data, "path": "data/LLaVA-OneVision-Data/onevision.yaml"},
        "start": {"all": {"stage": "single"}},
    }
    return c
