"""MiniGPT-v2 stage 3: many tasks, told apart by their tags.

Run:      lvlm train --config minigpt_v2_instruct --workdir runs/minigpt_v2
Hardware: planned for v5p-32 or 8 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (Vision-CAIR/MiniGPT-4, train_configs/minigptv2_finetune.yaml): the tower frozen at 448
pixels, the dense layer trained, and adapters of rank 64 and strength 16 on the language model's queries and values;
learning rate 1e-5 to 1e-6 by cosine after 1,000 steps of warm-up, weight decay 0.05, 50 x 1,000 steps, answers of at
most 1,024 tokens. Their adapters have a dropout of 0.05, which ours have not. A step of theirs draws one data set by
its sample_ratio and takes batch_size records of it on each device; so a record's weight here is the product of the two.
Theirs pads; here 16 rows of 1,536 positions hold about 36 records, as many as 8 devices of theirs see.

Data: each data set as a LLaVA JSON whose questions begin with the task's tag and whose boxes are written in hundredths,
as the authors' loaders make them (datasets/datasets/; `lvlm_jax.processing.boxes`, form "minigptv2"); override
stages.instruct.data.members.NAME.path. The front is EVA's file and the checkpoint of stage 2 the authors', both
converted to safetensors (`lvlm_jax/hub/minigpt4.py` says how); of the checkpoint a stage takes the dense layer alone.
To begin with its adapters too, load it with `lvlm_jax.load`, export it, and start from that folder (start.all.hub).
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS

DRAWN = {
    # data set: (sample_ratio, batch_size)
    "multitask_conversation": (50, 2),
    "llava_conversation": (30, 2),
    "unnatural_instruction": (10, 1),
    "refvg": (40, 6),
    "llava_detail": (20, 4),
    "llava_reason": (80, 4),
    "flickr_grounded_caption": (80, 2),
    "flickr_caption_to_phrase": (80, 2),
    "flickr_object_to_phrase": (80, 2),
    "coco_caption": (10, 6),
    "textcaps_caption": (30, 6),
    "refcoco": (25, 6),
    "refcocop": (25, 6),
    "refcocog": (25, 6),
    "invrefcoco": (10, 6),
    "invrefcocop": (10, 6),
    "invrefcocog": (10, 6),
    "coco_vqa": (15, 6),
    "ok_vqa": (8, 6),
    "aok_vqa": (12, 6),
    "gqa": (50, 6),
    "ocrvqa": (30, 6),
}


def get_config(arg: str = "") -> ConfigDict:
    """``minigpt_v2_instruct``: Llama-2-chat 7B."""
    if arg:
        raise ValueError(f"minigpt_v2_instruct:{arg}: it takes no argument")
    spec = SYSTEMS["minigpt_v2_7b"]
    members = {
        name: {
            "source": "llava_json",
            "path": f"./data/minigptv2/{name}.json",
            "images": "./data/minigptv2/images",
            "weight": float(ratio * rows),
        }
        for name, (ratio, rows) in DRAWN.items()
    }
    c = ConfigDict()
    c.name = "minigpt_v2_instruct"
    c.seed = 42  # their run.seed
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("instruct",)
    c.model = model_of(spec)
    c.stages = ConfigDict()
    c.stages.instruct = {
        "trains": ("connector/**",),
        "lora": {"targets": ("llm/**/attn/{q,v}",), "rank": 64, "alpha": 16.0},  # lora_r, lora_alpha
        "steps": 50_000,  # max_epoch 50, iters_per_epoch 1000
        "optimizer": {
            "learning_rate": 1e-5,  # init_lr
            "schedule": "cosine",  # linear_warmup_cosine_lr
            "end_factor": 0.1,  # min_lr 1e-6
            "warmup": 1000,  # warmup_steps
            "weight_decay": 0.05,
            "clip": None,
        },
        "data": {
            "source": "mixture",
            "members": members,
            "rows": 16,
            "groups": 16,
            "length": 1536,  # 256 of a picture, max_txt_len 1024, the question
            "pictures": 48,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {
            "vision": {"hub": "./data/eva"},
            "connector/linear_1": {"hub": "./data/minigptv2_stage2"},
            "llm": {"hub": spec.source},
        },
        "save_every": 1000,
    }
    return c
