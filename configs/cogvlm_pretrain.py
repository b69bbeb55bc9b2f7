"""CogVLM's pre-training: the visual expert, the projector and the ends, on captions, then on captions and places.

Run:      lvlm train --config cogvlm_pretrain --workdir runs/cogvlm_224
          lvlm train --config cogvlm_pretrain:490 --workdir runs/cogvlm_490
Hardware: planned for v5p-512, FSDP          Measured: not yet

Settings of the paper (arXiv 2311.03079):
- tower and language model frozen, what is trained begins as a copy of the language model (section 2.1): 6.6 of 17.6 B
- stage 1, "caption": 120,000 steps of 8,192 captions (section 2.2), learning rate 1e-4, 12,000 steps of warm-up
- stage 2, "ground": 60,000 steps of 1,024 captions and referring expressions, the second half at 490 pixels (section
  2.2), learning rate 1e-5, 1,200 steps of warm-up. ``:490`` is that second half: it goes on from runs/cogvlm_224, with
  the tower of the release at 490, whose positions the authors interpolated
- cosine, Adam with b2 0.95 and eps 1e-8, weight decay 0.05 (table of hyperparameters in the appendix)
Theirs drops a tenth of the activations in training, which does not exist here. The cosine is each run's own: theirs
falls once over the 60,000 steps of stage 2.

Captions are packed: a row of 2,048 positions holds about seven (258 of each are the picture), 8,192 pictures a step.

Data: tar shards of LAION and COYO, of img2dataset or alike; RefCOCO's files stand for the authors' 40 M pictures with
places, which they did not release. Override stages.X.data.path and .members. The tower comes out of the released base
model, where it is as it was before; Vicuna's repository holds pickle files, see llava15_align.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS

CAPTIONS = {"source": "webdataset", "path": "data/laion_coyo/{00000..09999}.tar"}
GROUNDING = {"source": "refcoco", "path": "data/refcoco", "images": "data/coco/train2014", "form": "cogvlm"}
TRAINS = ("connector/**", "ends/**", "llm/layers/*/expert_*/**")


def get_config(arg: str = "") -> ConfigDict:
    """``cogvlm_pretrain`` (224 pixels, both stages), or ``cogvlm_pretrain:490``, the end of the second."""
    if arg not in ("", "224", "490"):
        raise ValueError(f"cogvlm_pretrain:{arg}: choose one of ['224', '490']")
    side = arg or "224"
    spec = SYSTEMS[f"cogvlm_base_{side}"]
    optimizer = {"schedule": "cosine", "b2": 0.95, "eps": 1e-8, "weight_decay": 0.05, "clip": 1.0}
    c = ConfigDict()
    c.name = "cogvlm_pretrain"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("caption", "ground") if side == "224" else ("ground",)
    c.model = model_of(spec)
    tower = {"vision": {"hub": spec.source}}
    earlier = {part: {"workdir": "runs/cogvlm_224"} for part in ("connector", "ends", "llm")}
    caption = {
        "trains": TRAINS,
        "steps": 120000,
        "optimizer": {"learning_rate": 1e-4, "warmup": 12000, **optimizer},
        "data": {
            **CAPTIONS,
            "rows": 1280,
            "groups": 256,
            "length": 2048,
            "pictures": 8192,
            "workers": 16,
            "on_bad": "skip",
        },
        "start": {**tower, "llm": {"hub": "lmsys/vicuna-7b-v1.5"}},
        "save_every": 2000,
    }
    ground = {
        "trains": TRAINS,
        "steps": 30000,
        "optimizer": {"learning_rate": 1e-5, "warmup": 1200, **optimizer},
        "data": {
            "source": "mixture",
            "members": {"captions": {**CAPTIONS, "weight": 1.0}, "places": {**GROUNDING, "weight": 1.0}},
            # At 490 pixels a picture takes 1,227 of 2,048 positions: one a row.
            "rows": 256 if side == "224" else 1024,
            "groups": 256,
            "length": 2048,
            "pictures": 1024,
            "workers": 16,
            "on_bad": "skip",
        },
        "start": {"all": {"stage": "caption"}} if side == "224" else {**tower, **earlier},
        "save_every": 1000,
    }
    c.stages = ConfigDict({"caption": caption, "ground": ground} if side == "224" else {"ground": ground})
    return c
