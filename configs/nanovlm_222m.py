"""nanoVLM's 222M: SigLIP-B/16 and SmolLM2-135M-Instruct, all trained in one stage.

Run:      lvlm train --config nanovlm_222m --workdir runs/nanovlm_222m
Hardware: planned for one 80 GB accelerator          Measured: not yet

Sizes of the release: SigLIP-B/16 at 224 pixels to its final norm, a pixel shuffle of factor 2 and one dense layer (49
visual tokens a picture), SmolLM2-135M: 222 M weights. Settings of the repository (huggingface/nanoVLM at 340fd5f,
models/config.py, and train.py): learning rate 5.12e-3 for the connector and 5e-5 for tower and language model, AdamW,
clip 1.0, 3 % warm-up and a cosine down to a tenth, packed rows of 4,096 positions, at most 18 pictures in each, 2 rows
x 8 accumulated on each of their devices, 40,000 steps, ChatML without a system text. That revision trains a larger
model on several devices; this is one of them, with the sizes of the first release. (Their decay of 0.01 is torch's
default and touches every weight; ours leaves biases and norms alone.)

Data: any LLaVA JSON with its pictures (theirs is the Cauldron); override stages.train.data.path and .images.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``nanovlm_222m``; it takes no argument."""
    if arg:
        raise ValueError(f"nanovlm_222m:{arg}: choose one of []: this recipe takes no argument")
    spec = SYSTEMS["nanovlm_222m"]
    c = ConfigDict()
    c.name = "nanovlm_222m"
    c.seed = 0
    c.mesh = "DP"
    c.run = ("train",)
    c.model = model_of(spec)
    c.model.system = ""
    c.stages = ConfigDict()
    c.stages.train = {
        "trains": ("vision/**", "connector/**", "llm/**"),
        "steps": 40000,
        "optimizer": {
            "learning_rate": 5e-5,
            "lr_of": (("connector/**", 5.12e-3),),
            "schedule": "cosine",
            "warmup": 0.03,
            "end_factor": 0.1,
            "weight_decay": 0.01,
            "clip": 1.0,
        },
        "accumulate": 8,
        "data": {
            "source": "llava_json",
            "path": "data/the_cauldron/train.json",
            "images": "data/the_cauldron",
            "rows": 16,
            "groups": 16,
            "length": 4096,
            "pictures": 288,
            "workers": 4,
            "on_bad": "skip",
        },
        "start": {"vision": {"hub": "google/siglip-base-patch16-224"}, "llm": {"hub": spec.source}},
        "save_every": 1000,
    }
    return c
