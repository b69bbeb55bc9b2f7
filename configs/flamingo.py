"""Flamingo: resampler and gated blocks between NFNet-F6 and Chinchilla, on web pages and captions.

Run:      lvlm train --config flamingo --workdir runs/flamingo_3b
Hardware: planned for v5p-256, FSDP          Measured: not yet

Settings of the paper (arXiv 2204.14198), appendix B.1.2 unless another place is named:
- resampler and gated blocks trained, all else frozen
- 500,000 steps, learning rate 1e-4, constant after 5,000; AdamW, weight decay 0.1 but on the resampler none, gradients
  clipped to 1.0
- pictures of 320 pixels, flipped and with changed colours at random
- pages of 256 tokens and 5 pictures at most (section 2.4, appendix A.3.2)
- the loss is a sum over data sets, of weights 1.0 (M3W, pages), 0.2 (ALIGN) and 0.2 (LTIP). Here every token counts the
  same, and the shares of what is drawn give those weights: a page has 256 tokens, an ALIGN caption 12.4, an LTIP one
  20.5 (appendix A.3.3)
The size of a step is not published. Theirs also has videos (VTP, weight 0.03), whose frames share 64 tokens; shows text
the picture that follows, in half of the pages; and puts a space before half of the captions. Nothing here does.

None of the data sets, nor the weights of tower and language model, are public: OBELICS stands for M3W, and tower
and language model start at random unless stages.train.start says otherwise. Override stages.train.data.members.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``flamingo`` (3B), ``flamingo:9b``, ``flamingo:80b``."""
    systems = {"": "flamingo_3b", "3b": "flamingo_3b", "9b": "flamingo_9b", "80b": "flamingo_80b"}
    if arg not in systems:
        raise ValueError(f"flamingo:{arg}: choose one of {[name for name in systems if name]}")
    c = ConfigDict()
    c.name = "flamingo"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("train",)
    c.model = model_of(SYSTEMS[systems[arg]])
    c.stages = ConfigDict()
    c.stages.train = {
        "trains": ("connector/**", "fusion/**"),
        "steps": 500000,
        "optimizer": {
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup": 5000,
            "weight_decay": 0.1,
            "decay": ("fusion/**",),
            "clip": 1.0,
        },
        "data": {
            "source": "mixture",
            "members": {
                "pages": {
                    "source": "obelics",
                    "path": "data/obelics/*.parquet",
                    "max_pictures": 5,
                    "template": "flamingo",
                    "weight": 1.0 / 256,
                },
                "align": {"source": "webdataset", "path": "data/align/{00000..09999}.tar", "weight": 0.2 / 12.4},
                "ltip": {"source": "webdataset", "path": "data/ltip/{00000..09999}.tar", "weight": 0.2 / 20.5},
            },
            "rows": 2048,
            "groups": 128,
            "length": 256,
            "pictures": 16384,
            "augment": {"flip": True, "colour": 0.3},
            "workers": 16,
            "on_bad": "skip",
        },
        "save_every": 1000,
    }
    return c
