"""First weights out of BERT's and an EVA tower's files: what is there is read, all else stays as it was drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P
from lvlm_jax import recipe
from lvlm_jax.config import ConfigError
from lvlm_jax.hub.safetensors_io import write_folder
from lvlm_jax.kinds import KINDS
from lvlm_jax.kinds.initial import absent, initial
from lvlm_jax.kinds.pformer import bert_rows
from lvlm_jax.nn.linear import abstract
from tests import tiny

FOUND = recipe.load("pformer_pretrain:tiny")
KIND = KINDS["pformer"]


def drawn(scan=False):
    module = KIND.model(FOUND, {"dtype": jnp.float32, "scan": False, "remat": "none"})
    params = jax.tree.map(jnp.asarray, tiny.randomize(abstract(module, KIND.batch(FOUND))[0]))
    return P.stack_layers(params) if scan else params


def written(folder, rows, params, seed=1):
    """A file with the keys of the rows, norms named as the oldest files name them; (folder, what it holds)."""
    rng, flat, held = np.random.default_rng(seed), P.flatten(params), {}
    for row in rows:
        leaves = {path: rng.normal(size=flat[path].shape).astype(np.float32) for path in row.leaves}
        held[row.theirs] = np.ascontiguousarray(row.save(leaves))
    old = lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    write_folder(folder, [(old(key), tensor) for key, tensor in held.items()])
    return str(folder), held


@pytest.mark.parametrize("scan", [False, True])
def test_what_a_file_holds_is_read_and_nothing_else(tmp_path, scan):
    rows, params = bert_rows(FOUND.model.pformer), drawn(scan)
    name, held = written(tmp_path / "bert", rows, P.unstack_layers(params))
    got = initial(params, rows, name, "settings.bert")
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
    apart, before = (P.flatten(P.unstack_layers(tree)) for tree in (got, params))
    read = {path: leaf for row in rows for path, leaf in row.load(held[row.theirs]).items()}
    for path, leaf in apart.items():
        np.testing.assert_array_equal(leaf, read.get(path, before[path]), err_msg=path)
    assert {path.split("/")[1] for path in read} == {"embed", "position_embed", "type_embed", "norm", "layers"}
    assert initial(params, rows, "", "settings.bert") is params


def test_a_file_of_another_model_is_named(tmp_path):
    rows, params = bert_rows(FOUND.model.pformer), drawn()
    name, _ = written(tmp_path / "part", rows[2:], params)
    with pytest.raises(ConfigError, match=r"settings\.bert='.*part' holds no 'bert\.embeddings\.word_\w+\.weight'"):
        initial(params, rows, name, "settings.bert")
    flat = P.flatten(params)
    flat["pformer/embed/table"] = flat["pformer/embed/table"][:-3]
    smaller, _ = written(tmp_path / "small", rows, P.unflatten(flat))
    with pytest.raises(ConfigError, match=r"pformer/embed/table is \[509, 16\], the model has \[512, 16\]"):
        initial(params, rows, smaller, "settings.bert")
    assert absent("./nowhere", "settings.bert") == ["settings.bert='./nowhere' does not exist"]
    assert absent("google-bert/bert-base-uncased", "settings.bert") == []


def test_the_tower_of_blip2_is_evas_without_its_last_block():
    """Of the trunk every leaf comes from the file; the norm behind it is BLIP-2's own."""
    from lvlm_jax.vision import eva

    found = recipe.load("blip2_stage1")
    kind = KINDS["image_text"]
    shapes = P.flatten(abstract(kind.model(found, {"scan": False}), kind.batch(found))[0])
    rows = [row for row in eva.rows(found.model.vision) if row.leaves[0].startswith("vision/trunk/")]
    assert {path for row in rows for path in row.leaves} == {
        path for path in shapes if path.startswith("vision/trunk/")
    }
    rest = {path for path in shapes if path.startswith("vision/") and not path.startswith("vision/trunk/")}
    assert rest == {"vision/post_norm/scale", "vision/post_norm/bias"}
    assert max(int(path.split("/")[3]) for path in shapes if path.startswith("vision/trunk/layers/")) == 38
