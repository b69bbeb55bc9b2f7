"""VideoChat stage 2: conversations about videos and pictures.

Run:      lvlm train --config videochat_instruct --workdir runs/videochat_instruct
Hardware: planned for 32 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (OpenGVLab/Ask-Anything, video_chat/scripts/config_7b_stage2.py and run_7b_stage2.sh, 4
x 8 GPUs, one conversation each): what stage 1 trains, on 11,000 conversations about WebVid, 2,000 + 2,000 of LLaVA's
and 3,000 of MiniGPT-4's, 3 epochs, 8 frames a video, learning rate 2e-5 to 5e-6 by cosine after 0.6 epochs, weight
decay 0.02, no clip, 512 tokens of text. Role tags are learnt with the answers, and the start token is a row of ones,
since their code writes its id where its embedding belongs (models/videochat_it.py): set model.compat_bos_bug to None to
look it up, as their demo does. They count the conversation's order anew each epoch, and draw frames at random. Pictures
are as in videochat_align.

Data: the authors' JSON files (video_chat/anno/), with WebVid, COCO and MiniGPT-4's pictures beside; override
stages.instruct.data.members.*.path and .images. It starts from the end of a videochat_align run: override
stages.instruct.start.all.workdir.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS

FILES = {
    # train_file: name, pictures or videos
    "llava_conversation_2k": "coco",
    "llava_complex_reasoning_2k": "coco",
    "minigpt_caption_3k": "minigpt4",
    "videochat_instruct_11k": "webvid",
}


def get_config(arg: str = "") -> ConfigDict:
    """``videochat_instruct`` (Vicuna 7B) or ``:13b`` (StableVicuna)."""
    systems = {"": "videochat_7b", "7b": "videochat_7b", "13b": "videochat_13b"}
    if arg not in systems:
        raise ValueError(f"videochat_instruct:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    members = {
        name: {"source": "videochat", "path": f"./data/videochat/{name}.json", "images": f"./data/{folder}"}
        for name, folder in FILES.items()
    }
    c = ConfigDict()
    c.name = "videochat_instruct"
    c.seed = 42  # seed
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("instruct",)
    c.model = model_of(spec)
    c.model.compat_bos_bug = 1  # LLaMA's start token
    c.stages = ConfigDict()
    c.stages.instruct = {
        "trains": (
            *("vision/globals/**", "vision/post_norm/**"),
            *("connector/qformer/extra_queries", "connector/linear_1/**"),
        ),
        "steps": 3 * 18_000 // 32,  # epochs 3
        "optimizer": {
            "learning_rate": 2e-5,  # lr
            "schedule": "cosine",  # sched
            "end_factor": 0.25,  # min_lr_multi
            "warmup": 0.2,  # warmup_epochs 0.6 of 3
            "weight_decay": 0.02,
            # optimizer.py: no vectors
            "decay": ("**/kernel", "connector/qformer/extra_queries", "vision/globals/token"),
            "clip": None,  # max_grad_norm -1
        },
        "data": {
            "source": "mixture",
            "members": members,
            "template": "videochat_instruct",
            "rows": 32,  # batch_size 1 on each of 32
            "groups": 32,
            "length": 96 + 512,  # max_txt_l
            "pictures": 32 * 8,  # num_frames
            "pack": False,
            "workers": 8,
            "on_bad": "skip",
        },
        "start": {"all": {"workdir": "runs/videochat_align"}},
        "save_every": 500,
    }
    return c
