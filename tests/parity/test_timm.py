"""timm's VisionTransformer, in the environment that has it.

timm needs torchvision, whose wheel for this torch is a CUDA build: it is no part of the usual set, and the extra
`parity-timm` is an environment of its own. There, and only there, this file runs.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvlm_jax.hub.convert import export_folder, import_folder
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.hub.verify import verify
from lvlm_jax.nn.linear import abstract
from lvlm_jax.vision import timm as names
from lvlm_jax.vision.vit import VisionTower, patchify
from tests import tiny
from tests.parity import compare


def _declare() -> None:
    """The two operators that a torchvision for another device asks for when it is imported; nobody calls them here."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declare.library = library


_declare()
timm = pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)

PICTURES = np.random.default_rng(0).normal(size=(3, 28, 28, 3)).astype(np.float32)
SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
CASES = {
    "classifier": ({"class_token": True, "global_pool": "token"}, 5),
    "map": ({"class_token": False, "global_pool": "map"}, 5),
    "bare": ({"class_token": True, "global_pool": "token"}, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_tower(name):
    torch.manual_seed(0)
    change, classes = CASES[name]
    model = compare.perturb(timm.VisionTransformer(**SIZES, **change, num_classes=classes))
    public = {"architecture": "vit_base_patch16_224", "num_classes": classes, "model_args": SIZES | change}
    config = names.from_config(public)
    assert config.norm_eps == 1e-6
    assert names.from_config(names.to_config(config)) == config
    tower, args = VisionTower(config), patchify(jnp.asarray(PICTURES), 7)
    params = compare.load(names.rows(config, "", ""), compare.tensors(model), abstract(tower, *args)[0])
    with torch.no_grad():
        images = torch.tensor(PICTURES.transpose(0, 3, 1, 2))
        features = model.forward_features(images)
        pooled, scores = model.pool(features), model(images)

    def run(params):
        last, pooled = tower.apply({"params": params}, *args)
        return last, pooled, tower.apply({"params": params}, pooled, method="logits") if classes else pooled

    run = tiny.jit(run)
    for ours, theirs, what in zip(run(params), (features, pooled, scores), ("last layer", "pooled", "classes")):
        compare.close(ours, theirs, f"timm {name} {what}")
    assert {path for path in compare.dead(lambda p: run(p)[2], params) if not path.endswith("k/bias")} == set()


def test_folder_in_and_out(tmp_path):
    """Byte for byte, and equal to the torch library's ViT with the same weights."""
    torch.manual_seed(0)
    change, classes = CASES["classifier"]
    model = compare.perturb(timm.VisionTransformer(**SIZES, **change, num_classes=classes))
    (tmp_path / "in").mkdir()
    public = {"architecture": "vit_base_patch16_224", "num_classes": classes, "model_args": SIZES}
    (tmp_path / "in" / "config.json").write_text(json.dumps(public))
    save_file(model.state_dict(), tmp_path / "in" / "model.safetensors")
    loaded = import_folder(tmp_path / "in")
    assert (loaded.kind, loaded.layout) == ("vision", "timm")
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout="timm")
    one, other = TensorFolder(tmp_path / "in"), TensorFolder(tmp_path / "out")
    assert {key: one[key].tobytes() for key in one} == {key: other[key].tobytes() for key in other}
    assert import_folder(tmp_path / "out").config == loaded.config
    comparison = verify(tmp_path / "in")
    assert comparison.passed, str(comparison)
    assert "logits" in [part.name for part in comparison.parts]
