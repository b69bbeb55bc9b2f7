"""MiniGPT-4 stage 2: the same dense layer on 3,500 curated captions, in the form of a conversation.

Run:      lvlm train --config minigpt4_instruct --workdir runs/minigpt4_instruct
Hardware: planned for 1 x 80 GB (the authors' took 7 minutes on one A100)          Measured: not yet

Settings as the authors ran them (Vision-CAIR/MiniGPT-4, train_configs/minigpt4_stage2_finetune.yaml and
minigpt4_llama2_stage2_finetune.yaml): 12 conversations a step, 5 x 200 steps (the paper, arXiv 2304.10592, section 3.2,
says 400), learning rate 3e-5 to 1e-5 by cosine after 200 steps of warm-up, weight decay 0.05, answers of at most 160
tokens. One of four paraphrases asks for each description (prompts/alignment.txt).

Data: the authors' cc_sbu_align folder (dataset/README_2_STAGE.md); override stages.instruct.data.path. It starts from
the end of a minigpt4_align run: override stages.instruct.start.all.workdir.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``minigpt4_instruct`` (Vicuna 7B), ``:13b``, ``:llama2``."""
    systems = {"": "minigpt4_7b", "7b": "minigpt4_7b", "13b": "minigpt4_13b", "llama2": "minigpt4_llama2_7b"}
    if arg not in systems:
        raise ValueError(f"minigpt4_instruct:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    c = ConfigDict()
    c.name = "minigpt4_instruct"
    c.seed = 42  # their run.seed
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("instruct",)
    c.model = model_of(spec)
    c.stages = ConfigDict()
    c.stages.instruct = {
        "trains": ("connector/linear_1/**",),
        "steps": 1000,  # max_epoch 5, iters_per_epoch 200
        "optimizer": {
            "learning_rate": 3e-5,  # init_lr
            "schedule": "cosine",  # linear_warmup_cosine_lr
            "end_factor": 1 / 3,  # min_lr 1e-5
            "warmup": 200,  # warmup_steps
            "weight_decay": 0.05,
            "clip": None,
        },
        "data": {
            "source": "cc_sbu_align",
            "path": "./data/cc_sbu_align",
            "template": "minigpt4_llama2_align" if arg == "llama2" else "minigpt4_align",
            "rows": 12,  # batch_size
            "groups": 12,
            "length": spec.config.visual_tokens + 40 + 160,  # the question; max_txt_len
            "pictures": 12,
            "pack": False,
            "workers": 4,
            "on_bad": "skip",
        },
        "start": {"all": {"workdir": "runs/minigpt4_align"}},
        "save_every": 200,
    }
    return c
