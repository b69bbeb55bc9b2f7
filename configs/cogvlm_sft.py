"""CogVLM's instruction tuning: all but the tower, the language model's own weights at a tenth of the learning rate.

Run:      lvlm train --config cogvlm_sft --workdir runs/cogvlm_chat
Hardware: planned for v5p-128, FSDP          Measured: not yet

Settings of the paper (arXiv 2311.03079, section 2.3, CogVLM-Chat): 8,000 steps of 640, learning rate 1e-5, 50 steps of
warm-up, the language model at 1e-6 against forgetting, tower frozen; cosine, b2 0.95 and weight decay 0.05 as in their
pre-training.

Data: conversations about one picture as a LLaVA JSON: LLaVA-Instruct-150K, or the authors' CogVLM-SFT-311K (one JSON a
picture, roles user and assistant), put into one; override stages.instruct.data.path and .images. The prompt is that of
cogvlm-chat; --config.model.template=cogvlm_vqa asks for short answers.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``cogvlm_sft``."""
    if arg:
        raise ValueError(f"cogvlm_sft:{arg}: choose one of []; it takes no argument")
    c = ConfigDict()
    c.name = "cogvlm_sft"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("instruct",)
    c.model = model_of(SYSTEMS["cogvlm_chat"])
    c.stages = ConfigDict()
    c.stages.instruct = {
        "trains": ("connector/**", "ends/**", "llm/**"),
        "steps": 8000,
        "optimizer": {
            "learning_rate": 1e-5,
            "lr_of": (("llm/layers/*/expert_*/**", 1e-5), ("llm/**", 1e-6)),
            "schedule": "cosine",
            "warmup": 50,
            "b2": 0.95,
            "weight_decay": 0.05,
            "clip": 1.0,
        },
        "data": {
            "source": "llava_json",
            "path": "data/LLaVA-Instruct-150K/llava_instruct_150k.json",
            "images": "data/coco/train2017",
            "rows": 640,
            "groups": 64,
            "length": 2048,
            "pictures": 640,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {"all": {"hub": "THUDM/cogvlm-base-490-hf"}},
        "save_every": 500,
    }
    return c
