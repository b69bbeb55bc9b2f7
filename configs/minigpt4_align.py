"""MiniGPT-4 stage 1: align the one dense layer.

Run:      lvlm train --config minigpt4_align --workdir runs/minigpt4_align
Hardware: planned for v5p-64 or 4 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (Vision-CAIR/MiniGPT-4, train_configs/minigpt4_stage1_pretrain.yaml and
minigpt4_llama2_stage1_pretrain.yaml, on 4 A100): tower, Q-Former and language model frozen, the dense layer trained on
captions of LAION and of CC and SBU, drawn 115 to 14; 4 x 64 pairs a step, 4 x 5,000 steps, learning rate 1e-4 to 8e-5
by cosine after 5,000 steps of warm-up, weight decay 0.05, no clip, captions of at most 32 tokens, each behind its
picture and ended by a line break (models/minigpt_base.py). Theirs warms up from 1e-6 where we begin at 0, and writes
captions in small letters without punctuation (processors/blip_processors.py), where we leave them as they are. Theirs
pads each pair; here 64 rows of 288 positions hold about four pairs each, so that a step still sees about 256.

Data: img2dataset's tars of LAION and of CC and SBU (dataset/README_1_STAGE.md). The front are the authors' two files,
converted to safetensors in one folder (`lvlm_jax/hub/minigpt4.py` says how); so is Vicuna, whose repository holds
pickles. Override stages.align.data.members.*.path and stages.align.start.*.hub.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``minigpt4_align`` (Vicuna 7B), ``:13b``; ``:llama2`` reads four patches of a row instead of a Q-Former."""
    systems = {"": "minigpt4_7b", "7b": "minigpt4_7b", "13b": "minigpt4_13b", "llama2": "minigpt4_llama2_7b"}
    if arg not in systems:
        raise ValueError(f"minigpt4_align:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    c = ConfigDict()
    c.name = "minigpt4_align"
    c.seed = 42  # their run.seed
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("align",)
    c.model = model_of(spec)
    front = {"hub": "./data/blip2_front"}
    c.stages = ConfigDict()
    c.stages.align = {
        "trains": ("connector/linear_1/**",),
        "steps": 20_000,  # max_epoch 4, iters_per_epoch 5000
        "optimizer": {
            "learning_rate": 1e-4,  # init_lr
            "schedule": "cosine",  # linear_warmup_cosine_lr
            "end_factor": 0.8,  # min_lr 8e-5
            "warmup": 5000,  # warmup_steps
            "weight_decay": 0.05,
            "clip": None,
        },
        "data": {
            "source": "mixture",
            "members": {  # sample_ratio
                "laion": {"source": "webdataset", "path": "./data/laion/{00000..10488}.tar", "weight": 115.0},
                "cc_sbu": {"source": "webdataset", "path": "./data/cc_sbu/{00000..01255}.tar", "weight": 14.0},
            },
            "template": "plain",
            "rows": 64,
            "groups": 64,
            "length": 4 * (spec.config.visual_tokens + 40),
            "pictures": 256,  # batch_size 64 on each of 4
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {
            "vision": front,
            **({} if arg == "llama2" else {"connector/qformer": front}),
            "llm": {"hub": spec.source},
        },
        "save_every": 5000,
    }
    return c
