"""VideoChat stage 1: align the blocks over time, the extra queries and the dense layer.

Run:      lvlm train --config videochat_align --workdir runs/videochat_align
Hardware: planned for v5p-64 or 32 x 80 GB, FSDP          Measured: not yet

Settings as the authors ran them (OpenGVLab/Ask-Anything, video_chat/scripts/config_7b_stage1.py and run_7b_stage1.sh, 4
x 8 GPUs): EVA's tower, Q-Former and language model frozen; trained are the blocks over time and the norm behind them,
64 queries beside the Q-Former's own, and the dense layer. One epoch of about 25 M captions (WebVid-10M, CC3M and CC12M,
SBU, COCO, Visual Genome: the paper, arXiv 2305.06355, section 4.1), 32 x 32 a step, 4 frames a video, learning rate
1e-4 to 1e-6 by cosine after a fifth of the epoch, weight decay 0.02, no clip, captions of at most 32 tokens, in the
prompts of prompts/concise_description.txt.

Otherwise than theirs: frames are the evaluation's (theirs are drawn at random), there is no dropout of 0.5 in the
blocks over time, and pictures stand still for 4 frames where theirs are clips of one; rows of 2,048 positions are
packed; pictures are neither cut nor mirrored at random, and normalised as their demo does it, with CLIP's mean and
deviation, where their training took ImageNet's (dataset/__init__.py).

Data: a LLaVA JSON (or JSONL) whose human turn is ``<image>`` or ``<video>`` and one of those prompts; override
stages.align.data.path and .images. The front are the authors' two files (`lvlm_jax/hub/minigpt4.py`); Vicuna's pickles
go through the torch library once. Override stages.align.start.*.hub.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``videochat_align`` (Vicuna 7B) or ``:13b`` (StableVicuna)."""
    systems = {"": "videochat_7b", "7b": "videochat_7b", "13b": "videochat_13b"}
    if arg not in systems:
        raise ValueError(f"videochat_align:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    c = ConfigDict()
    c.name = "videochat_align"
    c.seed = 42  # seed
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("align",)
    c.model = model_of(spec)
    c.model.vision.frames = c.model.video.frames = 4  # num_frames
    c.model.video.sentence = "none"
    front = {"hub": "./data/blip2_front"}
    c.stages = ConfigDict()
    c.stages.align = {
        "trains": (
            *("vision/globals/**", "vision/post_norm/**"),
            *("connector/qformer/extra_queries", "connector/linear_1/**"),
        ),
        "steps": 25_000_000 // 1024,  # epochs 1
        "optimizer": {
            "learning_rate": 1e-4,  # lr
            "schedule": "cosine",  # sched
            "end_factor": 0.01,  # min_lr_multi
            "warmup": 0.2,  # warmup_epochs
            "weight_decay": 0.02,
            # optimizer.py: no vectors
            "decay": ("**/kernel", "connector/qformer/extra_queries", "vision/globals/token"),
            "clip": None,  # max_grad_norm -1
        },
        "data": {
            "source": "llava_json",
            "path": "./data/webvid10m_14m.jsonl",
            "images": "./data/videos_images",
            "template": "videochat_align",
            "rows": 96,
            "groups": 32,
            "length": 2048,
            "pictures": 1024 * 4,  # batch_size 32 on each of 32, 4 frames each
            "workers": 16,
            "on_bad": "skip",
        },
        "start": {
            "vision/trunk": front,
            "vision/post_norm": front,
            "connector/qformer/queries": front,
            "connector/qformer/norm": front,
            "connector/qformer/layers": front,
            "llm": {"hub": spec.source},
        },
        "save_every": 2000,
    }
    return c
