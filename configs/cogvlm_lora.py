"""CogVLM's fine-tuning with adapters on one task, as its authors' demo does it: reading captchas.

Run:      lvlm train --config cogvlm_lora --workdir runs/captcha
Hardware: planned for 8 x 80 GB, FSDP (the frozen weights are 35 GB in bfloat16)          Measured: not yet

Settings of the authors' finetune_demo (github.com/THUDM/CogVLM):
- adapters of rank 10 (finetune_cogvlm_lora.sh) and alpha 1 (their library's default) beside queries, keys, values and
  outputs of the language model's own weights and of the tower; the expert stays as it is (finetune_cogvlm_demo.py)
- the feed-forward of the tower's layers 46 to 54 trained whole (finetune_cogvlm_demo.py, disable_untrainable_params)
- 800 steps, cosine down to a tenth, 2 % warm-up, 1,288 positions (finetune_cogvlm_lora.sh)
- learning rate 1e-5, Adam with b2 0.95, weight decay 0.05, gradients clipped to 0.1, 4 a device, here 32 for its 8
  (test_config_bf16.json)

Data: the 8,000 training pictures of the Captcha Images data set, each with its file's name as the answer to
"CAPTCHA:" (utils/dataset.py), as a LLaVA JSON; override stages.tune.data.path and .images for a task of your own.
Layers stand one by one (scan="no"), since only some of the tower's train.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``cogvlm_lora`` (490 pixels), or ``cogvlm_lora:224``."""
    if arg not in ("", "224", "490"):
        raise ValueError(f"cogvlm_lora:{arg}: choose one of ['224', '490']")
    spec = SYSTEMS[f"cogvlm_base_{arg or '490'}"]
    c = ConfigDict()
    c.name = "cogvlm_lora"
    c.seed = 2023
    c.mesh = "FSDP"
    c.remat = "full"
    c.scan = "no"
    c.run = ("tune",)
    c.model = model_of(spec)
    c.stages = ConfigDict()
    c.stages.tune = {
        "trains": tuple(f"vision/trunk/layers/{i}/mlp/**" for i in range(46, 55)),
        "lora": {
            "targets": ("llm/layers/*/attn/**", "vision/trunk/layers/*/attn/**"),
            "rank": 10,
            "alpha": 1.0,
        },
        "steps": 800,
        "optimizer": {
            "learning_rate": 1e-5,
            "schedule": "cosine",
            "end_factor": 0.1,
            "warmup": 0.02,
            "b2": 0.95,
            "weight_decay": 0.05,
            "clip": 0.1,
        },
        "data": {
            "source": "llava_json",
            "path": "data/captcha/train.json",
            "images": "data/captcha/train",
            "rows": 32,
            "groups": 8,
            "length": spec.config.visual_tokens + 61,  # 1,288 at 490 pixels
            "pictures": 32,
            "pack": False,
            "workers": 4,
            "on_bad": "skip",
        },
        "start": {"all": {"hub": spec.source}},
        "save_every": 200,
    }
    return c
