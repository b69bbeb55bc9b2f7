"""The ViT and AugReg releases' npz, against their flax module re-derived from its equations.

x = [cls; patches E] + p. A block: x <- x + sum_h softmax(q_h k_h / sqrt(e)) v_h O_h of LN(x), q_h = LN(x) Q_h + b; then
x <- x + W2 gelu_tanh(W1 LN(x)). Scores: W LN(x)[0]. Heads are an axis of every kernel; epsilon 1e-6.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.hub.convert import import_folder
from lvlm_jax.hub.verify import verify
from lvlm_jax.vision import vit_jax
from lvlm_jax.vision.vit import VisionTower, patchify
from tests import tiny
from tests.parity import compare
from tests.parity.test_vit import pictures

D, H, E, F, DEPTH, CLASSES = 32, 4, 8, 48, 3, 5


def weights():
    """A file's tensors by key, none of them at a special value."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, spread=0.3: (spread * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    norm = lambda: {"scale": 1 + draw(D), "bias": draw(D)}  # noqa: E731
    dense = lambda i, o: {"kernel": draw(*i, *o, spread=np.prod(i) ** -0.5), "bias": draw(*o)}  # noqa: E731
    out = {"embedding": dense((7, 7, 3), (D,)), "head": dense((D,), (CLASSES,)), "Transformer/encoder_norm": norm()}
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        out |= {f"{block}/LayerNorm_0": norm(), f"{block}/LayerNorm_2": norm()}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        out |= {f"{attention}/{name}": dense((D,), (H, E)) for name in ("query", "key", "value")}
        out[f"{attention}/out"] = dense((H, E), (D,))
        out |= {f"{block}/MlpBlock_3/Dense_0": dense((D,), (F,)), f"{block}/MlpBlock_3/Dense_1": dense((F,), (D,))}
    flat = {f"{name}/{leaf}": value for name, leaves in out.items() for leaf, value in leaves.items()}
    return flat | {"cls": draw(1, 1, D), "Transformer/posembed_input/pos_embedding": draw(1, 17, D)}


def reference(w, images):
    """(normed hidden states, scores) in float64."""
    w = {key: value.astype(np.float64) for key, value in w.items()}

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{at}/scale"] + w[f"{at}/bias"]

    def affine(x, at, how):
        return np.einsum(how, x, w[f"{at}/kernel"]) + w[f"{at}/bias"]

    patches = images.reshape(-1, 4, 7, 4, 7, 3).swapaxes(2, 3).astype(np.float64)
    x = affine(patches, "embedding", "nrcabk,abkd->nrcd").reshape(len(images), 16, D)
    x = np.concatenate([np.tile(w["cls"], (len(x), 1, 1)), x], 1) + w["Transformer/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        at, y = f"{block}/MultiHeadDotProductAttention_1", norm(x, f"{block}/LayerNorm_0")
        q, k, v = (affine(y, f"{at}/{name}", "ntd,dhe->nthe") for name in ("query", "key", "value"))
        scores = np.einsum("nthe,nshe->nhts", q, k) / E**0.5
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nhts,nshe->nthe", scores / scores.sum(-1, keepdims=True), v)
        x = x + affine(mixed, f"{at}/out", "nthe,hed->ntd")
        y = affine(norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3/Dense_0", "ntd,df->ntf")
        y = 0.5 * y * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))
        x = x + affine(y, f"{block}/MlpBlock_3/Dense_1", "ntf,fd->ntd")
    x = norm(x, "Transformer/encoder_norm")
    return x, affine(x[:, 0], "head", "nd,dv->nv")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "B_16.npz"
    np.savez(path, **weights())
    return path


def test_parity_and_every_key(file):
    loaded, theirs = import_folder(file), weights()
    assert (loaded.kind, loaded.layout) == ("vision", "vit_jax")
    assert (loaded.config.heads, loaded.config.classes, loaded.config.activation) == (H, CLASSES, "gelu_tanh")
    params = compare.load(vit_jax.rows(loaded.config, "", ""), theirs, loaded.params)
    tower, args = VisionTower(loaded.config), patchify(jnp.asarray(pictures()), 7)
    hidden, pooled = tiny.jit(lambda p: tower.apply({"params": p}, *args))(params)
    scores = tower.apply({"params": params}, pooled, method="logits")
    wanted, expected = reference(theirs, pictures())
    compare.close(hidden, wanted, "vit_jax last layer (re-derived)")
    compare.close(scores, expected, "vit_jax classes (re-derived)")


def test_the_torch_library_has_the_same_numbers(file):
    comparison = verify(file)
    assert comparison.passed, str(comparison)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_logits/kernel": np.zeros((D, D))}, "pre_logits is not supported; supported: a classifier directly"),
        ({"head/bias": None}, "head/bias is missing; is it a whole ViT with class token"),
        ({"Transformer/posembed_input/pos_embedding": np.zeros((1, 16, D))}, "has 15 places, which are no square"),
    ],
)
def test_files_that_are_not_read(tmp_path, change, message):
    content = {key: value for key, value in (weights() | change).items() if value is not None}
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "x.npz")
