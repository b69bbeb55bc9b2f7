"""LoRA of a public LLaVA on your own pictures and conversations.

Run:      lvlm train --config lora_your_data --workdir runs/mine --config.stages.tune.data.path=mine.json
Hardware: planned for one 80 GB GPU or TPU v5p-8 (7B: 14 GB of frozen bfloat16 weights)          Measured: not yet

``lora_your_data:SYSTEM`` takes another system (``lvlm list``), ``lora_your_data:FOLDER`` a folder of yours: any public
LLaVA, or the workdir of an earlier run. mine.json holds LLaVA conversations; pictures lie beside it, or where
--config.stages.tune.data.images says. ``lvlm data check --llava mine.json`` checks them first.

Settings of the LLaVA authors' scripts/v1_5/finetune_task_lora.sh (haotian-liu/LLaVA), but for dropout, which is 0.05
there and does not exist here: rank 128, alpha 256, adapters in every linear layer of the language model at 2e-4, the
projector trained whole at 2e-5, cosine with 3 % warm-up, one epoch of batch 128. How many steps that is depends on your
data: set stages.tune.steps. Conversations are packed here, so 8 rows hold some 20 of them. Where a system cuts pictures
into tiles, a row is longer and has room for one of the most tiles.

A smaller machine (24 GB): --config.stages.tune.lora.base=nf4 --config.scan=no holds the frozen kernels in 4 bits.
Afterwards: lvlm chat runs/mine; lvlm convert export runs/mine out --adapter writes the adapter for the peft package.
"""

from pathlib import Path

from ml_collections import ConfigDict

from lvlm_jax.config import build
from lvlm_jax.processing.tiles import largest
from lvlm_jax.recipe_model import Model, model_of, model_of_folder
from lvlm_jax.zoo import SYSTEMS


def get_config(arg: str = "") -> ConfigDict:
    """``lora_your_data`` (LLaVA-1.5 7B), or with a system's name or a checkpoint's folder behind a colon."""
    name, released = arg or "llava15_7b", [name for name, spec in SYSTEMS.items() if spec.released]
    if name not in released and not Path(name).is_dir():
        raise ValueError(f"lora_your_data:{name}: choose one of {released}, or give a folder that is there")
    known = name in SYSTEMS
    model = model_of(SYSTEMS[name]) if known else model_of_folder(name)
    length, pictures = _room(build(Model, model.to_dict(), "config.model"))
    c = ConfigDict()
    c.name = "lora_your_data"
    c.seed = 0
    c.mesh = "FSDP"
    c.remat = "full"
    c.run = ("tune",)
    c.model = model
    c.stages = ConfigDict()
    c.stages.tune = {
        "trains": ("connector/**",),
        "lora": {"targets": ("llm/**",), "rank": 128, "alpha": 256.0},
        "steps": 1000,
        "optimizer": {
            "learning_rate": 2e-4,
            "lr_of": (("connector/**", 2e-5),),
            "schedule": "cosine",
            "warmup": 0.03,
            "weight_decay": 0.0,
            "clip": 1.0,
        },
        "data": {
            "source": "llava_json",
            "path": "data/mine.json",
            "rows": 8,
            "groups": 8,
            "length": length,
            "pictures": 8 * pictures,
            "workers": 4,
            "on_bad": "skip",
        },
        "start": {"all": {"hub": SYSTEMS[name].source if known else model.tokenizer}},
        "save_every": 200,
    }
    return c


def _room(model: Model) -> tuple[int, int]:
    """(positions, vision rows) of a text row: three pictures, or one where it is cut into tiles, and what is said."""
    frames, talk = model.vision.frames, 1024
    rows, positions = frames, frames * model.lvlm.visual_tokens
    if model.image.tiles is not None:
        rows, positions = largest(model.image.tiles, model.image.size, model.lvlm.visual_tokens)
    length = max(2048, -(-(positions + talk) // 1024) * 1024)
    return min(length, model.llm.context), max(3 * frames, rows)
