"""timm's VisionTransformer, Eva and NormFreeNet, in the environment that has it.

timm needs torchvision, whose wheel for this torch is a CUDA build: it is no part of the usual set, and the extra
`parity-timm` is an environment of its own. There, and only there, this file runs.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
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
timm = pytest.importorskip("timm", exc_type=ImportError)

PICTURES = np.random.default_rng(0).normal(size=(3, 28, 28, 3)).astype(np.float32)
SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
_VIT, _EVA02 = "vit_base_patch16_224", "eva02_base_patch16_clip_224"
CASES = {
    "classifier": (_VIT, {"class_token": True, "global_pool": "token"}, 5),
    "map": (_VIT, {"class_token": False, "global_pool": "map"}, 5),
    "bare": (_VIT, {"class_token": True, "global_pool": "token"}, 0),
    "EVA-01": ("eva_giant_patch14_clip_224", {}, 5),
    "EVA-02": (_EVA02, {"mlp_ratio": 8 / 3, "ref_feat_shape": [16, 16]}, 5),
    "EVA-02 without rotation": (_EVA02, {"use_rot_pos_emb": False}, 0),
    "EVA-02, norms behind": ("eva02_enormous_patch14_clip_224", {}, 5),
}
"""Architecture, what is changed of it beside the sizes, and classes."""


def build(name):
    """(their model, timm's config.json of it)"""
    torch.manual_seed(0)
    architecture, change, classes = CASES[name]
    args = SIZES | change
    # Eva scales its classifier's first weights down until its bias is all there is of the scores.
    spread = {} if architecture == _VIT else {"head_init_scale": 1.0}
    model = compare.perturb(timm.create_model(architecture, num_classes=classes, **args, **spread))
    return model, {"architecture": architecture, "num_classes": classes, "model_args": args}


@pytest.mark.parametrize("name", CASES)
def test_tower(name):
    model, public = build(name)
    config, classes = names.from_config(public), public["num_classes"]
    assert config.norm_eps == 1e-6
    assert names.from_config(names.to_config(config)) == config
    tower, args = VisionTower(config), patchify(jnp.asarray(PICTURES), 7)
    params = compare.load(names.rows(config, "", ""), compare.tensors(model), abstract(tower, *args)[0])
    with torch.no_grad():
        images = torch.tensor(PICTURES.transpose(0, 3, 1, 2))
        features, between = model.forward_intermediates(images, indices=[1], output_fmt="NLC")
        pooled, scores = model.forward_head(features, pre_logits=True), model(images)

    def run(params):
        last, pooled = tower.apply({"params": params}, *args)
        logits = tower.apply({"params": params}, pooled, method="logits") if classes else pooled
        return last, pooled, logits, tower.apply({"params": params}, *args, method="features")

    run = tiny.jit(run)
    what = ("last layer", "pooled", "classes", "penultimate")
    for ours, theirs, part in zip(run(params), (features, pooled, scores, between[0]), what):
        compare.close(ours, theirs, f"timm {name} {part}")
    assert {path for path in compare.dead(lambda p: run(p)[2], params) if not path.endswith("k/bias")} == set()


def test_eva02_at_other_grids_than_its_own():
    """A picture of any shape: the table is resized, and the places that turn are scaled to the pre-training grid."""
    torch.manual_seed(0)
    args = SIZES | {"dynamic_img_size": True, "ref_feat_shape": [4, 4]}
    model = compare.perturb(timm.create_model(_EVA02, num_classes=0, **args))
    config = names.from_config({"architecture": _EVA02, "model_args": args})
    images = np.random.default_rng(0).normal(size=(2, 21, 49, 3)).astype(np.float32)
    tower, given = VisionTower(config), patchify(jnp.asarray(images), 7)
    params = compare.load(names.rows(config, "", ""), compare.tensors(model), abstract(tower, *given)[0])
    with torch.no_grad():
        features = model.forward_features(torch.tensor(images.transpose(0, 3, 1, 2)))
    ours = tiny.jit(lambda p: tower.apply({"params": p}, *given)[0])(params)
    compare.close(ours, features, "timm EVA-02 at 21 x 49")


NFNET = {"depths": [1, 1, 2, 1], "channels": [32, 64, 96, 96], "group_size": 8, "stem_chs": 16, "num_features": 112}


def nfnet():
    torch.manual_seed(0)
    model = compare.perturb(timm.create_model("dm_nfnet_f0", num_classes=5, **NFNET))
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if name.endswith("skipinit_gain"):  # single numbers, zero at first
                gain.fill_(0.7)
            elif name.endswith(".gain"):  # vectors in the shape of a kernel: five times as large, biases would vanish
                gain.copy_(1 + 0.3 * torch.randn(gain.shape))
    public = {"architecture": "dm_nfnet_f0", "num_classes": 5, "model_args": NFNET}
    return model, public | {"pretrained_cfg": {"input_size": [3, 64, 64]}}


def test_nfnet():
    """All of it, and the map before the last convolution; the class's own gradient of a kernel in the middle, too."""
    model, public = nfnet()
    config = names.from_config(public)
    assert (config.image_size, config.patches) == (64, 4)
    assert names.from_config(names.to_config(config)) == config
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    tower, args = config.build(jnp.float32), patchify(jnp.asarray(images), config.patch_size)
    params = compare.load(names.rows(config, "", ""), compare.tensors(model), abstract(tower, *args)[0])
    end = dataclasses.replace(config, feature_layer=-1).build(jnp.float32)

    def run(params):
        variables = {"params": params}
        last, pooled = tower.apply(variables, *args)
        before, behind = (module.apply(variables, *args, method="features") for module in (tower, end))
        return last, before, behind, tower.apply(variables, pooled, method="logits")

    given = torch.tensor(images.transpose(0, 3, 1, 2))
    before = model.stages(model.stem(given))
    features, scores = model.forward_features(given), model(given)
    scores.square().sum().backward()
    theirs = [x.flatten(2).transpose(1, 2) for x in (features, before, features)]
    for ours, wanted, part in zip(jax.jit(run)(params), (*theirs, scores), ("last", "before", "behind", "classes")):
        compare.close(ours, wanted, f"timm NFNet {part}")
    grads = jax.jit(jax.grad(lambda p: jnp.square(run(p)[3]).sum()))(params)
    assert [path for path, leaf in P.flatten(grads).items() if not np.asarray(leaf).any()] == []
    theirs = model.stages[2][1].conv2b.weight.grad.permute(2, 3, 1, 0)
    compare.close(grads["stages_2"]["layers"]["0"]["conv3"]["kernel"], theirs, "timm NFNet d kernel")


def written(folder, model, public):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(public))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "layout"), [("classifier", "timm"), ("EVA-02", "timm"), ("NFNet", "nfnet")])
def test_folder_in_and_out(name, layout, tmp_path):
    """Byte for byte."""
    folder = written(tmp_path / "in", *(nfnet() if name == "NFNet" else build(name)))
    loaded = import_folder(folder)
    assert (loaded.kind, loaded.layout) == ("vision", layout)
    export_folder(tmp_path / "out", loaded.config, loaded.params, layout=layout)
    one, other = TensorFolder(folder), TensorFolder(tmp_path / "out")
    assert {key: one[key].tobytes() for key in one} == {key: other[key].tobytes() for key in other}
    assert import_folder(tmp_path / "out").config == loaded.config
    if name != "classifier":
        with pytest.raises(CheckpointError, match=r"no class for this model .*one of timm's towers"):
            verify(folder)


def test_equal_to_the_torch_librarys_vit(tmp_path):
    comparison = verify(written(tmp_path / "in", *build("classifier")))
    assert comparison.passed, str(comparison)
    assert "logits" in [part.name for part in comparison.parts]
