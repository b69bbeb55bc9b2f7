"""OpenFlamingo: resampler, gated blocks and the new words, on web pages with pictures and on captions.

Run:      lvlm train --config openflamingo_interleaved --workdir runs/openflamingo_3b
Hardware: planned for v5p-64 or 64 x 40 GB, FSDP          Measured: not yet

Settings of the authors' repository (mlfoundations/open_flamingo, version 2):
- resampler, gated blocks, and of the table the rows of the new words alone (src/factory.py, train/train_utils.py); here
  those rows are a table of their own (`model.words`), and the host's is cut to its tokenizer's words as theirs is
- learning rate 1e-4, constant after 1,875 steps (scripts/run_train.sh), weight decay 0.1 on every weight of the gated
  blocks and on nothing else (train/train.py), gradients clipped to 1.0 (train/train_utils.py)
- 2,048 pages of MMC4 (32 a device, 64 of them) and 4,096 captions of LAION a step, 60 M pages in all (run_train.sh;
  arXiv 2308.01390, section 3): 29,297 steps
- pages of 256 tokens and 6 pictures at most, similarity 0.24 at least, pictures flipped at random (train/data.py)
Theirs averages each of the two over its own tokens and weighs captions with 0.2; here every token counts the same,
which gives the captions about a sixth of the loss, as 0.2 beside 1.0 does. Theirs also drops half of the pages with one
picture, and pictures below 10 KB.

Data: shards of MMC4 by the authors' convert_mmc4_to_wds.py, and of LAION by img2dataset; override
stages.train.data.members. The hosts' files are pickles: load one in the torch library, save it as safetensors in a
folder, and override stages.train.start.llm.hub and model.tokenizer.
"""

from ml_collections import ConfigDict

from lvlm_jax.recipe_model import model_of
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``openflamingo_interleaved`` (3B), ``:4b``, ``:9b``; the last two have a gated block every 2 and 4 layers."""
    systems = {"": "open_flamingo_3b", "3b": "open_flamingo_3b", "4b": "open_flamingo_4b", "9b": "open_flamingo_9b"}
    if arg not in systems:
        raise ValueError(f"openflamingo_interleaved:{arg}: choose one of {[name for name in systems if name]}")
    spec = SYSTEMS[systems[arg]]
    c = ConfigDict()
    c.name = "openflamingo_interleaved"
    c.seed = 42
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("train",)
    c.model = model_of(spec)
    c.model.llm.vocab, c.model.words = spec.config.llm.vocab - 3, 3
    c.stages = ConfigDict()
    c.stages.train = {
        "trains": ("connector/**", "fusion/**", "words/table"),
        "steps": 29297,
        "optimizer": {
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup": 1875,
            "weight_decay": 0.1,
            "decay": ("fusion/**",),
            "clip": 1.0,
        },
        "data": {
            "source": "mixture",
            "members": {
                "pages": {
                    "source": "mmc4_tar",
                    "path": "data/mmc4/shard-{0000..0999}.tar",
                    "min_similarity": 0.24,
                    "max_pictures": 6,
                    "template": "flamingo",
                    "weight": 1.0,
                },
                "captions": {
                    "source": "webdataset",
                    "path": "data/laion2b/{00000..00999}.tar",
                    "weight": 2.0,
                },
            },
            # A page fills a row of 256; about ten captions share one.
            "rows": 2432,
            "groups": 64,
            "length": 256,
            "pictures": 10240,
            "augment": {"flip": True},
            "workers": 16,
            "on_bad": "skip",
        },
        "start": {"vision": {"hub": "openai/clip-vit-large-patch14"}, "llm": {"hub": spec.source}},
        "save_every": 500,
    }
    return c
