"""Qwen2.5-VL on your own conversations: connector and language model trained, the tower frozen.

Run:      lvlm train --config qwen2_5_vl_finetune --workdir runs/qwen2_5_vl_finetune
Hardware: planned for v5p-64 or 32 x 80 GB, FSDP          Measured: not yet

Settings as the authors give them (QwenLM/Qwen3-VL, qwen-vl-finetune/scripts/sft_7b.sh): tune_mm_vision False,
tune_mm_mlp and tune_mm_llm True; learning rate 2e-7, cosine with 3 % warm-up, no weight decay, clip 1.0; pictures of
784 to 50,176 pixels; 8,192 positions; 4 conversations a GPU, accumulated 4 times (128 a step on eight GPUs), half an
epoch of data that the script leaves to its user. Here it is 1,000 steps: override stages.tune.steps. Theirs lays the
conversations of a GPU side by side in one row (data_flatten), as packing does here: 32 rows are eight GPUs, four times,
and hold more, since packing fills them. They also train the line break behind each answer's <|im_end|>, which no
template here does.

Data: any LLaVA JSON with its pictures (theirs is the same form); override stages.tune.data.path and .images. Vision
rows hold 256 patches, one picture of 50,176 pixels; small pictures of one conversation share one.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``qwen2_5_vl_finetune`` (7B), ``:3b``, ``:32b``."""
    systems = {"": "qwen2_5_vl_7b", **{size: f"qwen2_5_vl_{size}" for size in ("3b", "7b", "32b")}}
    if arg not in systems:
        raise ValueError(f"qwen2_5_vl_finetune:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    c = ConfigDict()
    c.name = "qwen2_5_vl_finetune"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("tune",)
    c.model = model_of(spec)
    c.model.image.native.min_pixels = 784
    c.model.image.native.max_pixels = 50176
    # A frame of a video is no larger, so that it fits a vision row.
    c.model.image.native.min_frame = 784
    c.model.image.native.max_frame = 50176
    c.model.image.max_patches = c.model.vision.max_patches = 256
    c.model.image.size = 16 * spec.image.patch
    c.stages = ConfigDict()
    c.stages.tune = {
        "trains": ("connector/**", "llm/**"),
        "steps": 1000,
        "optimizer": {
            "learning_rate": 2e-7,
            "schedule": "cosine",
            "warmup": 0.03,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "data": {
            "source": "llava_json",
            "path": "data/yours/conversations.json",
            "images": "data/yours",
            "rows": 32,
            "groups": 32,
            "length": 8192,
            "pictures": 256,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {"all": {"hub": spec.source}},
        "save_every": 1000,
    }
    return c
