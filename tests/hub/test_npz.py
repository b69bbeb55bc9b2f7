"""big_vision's files: SigLIP in both layouts, no pickle, the same numbers as the torch library, byte for byte back."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers as hf

torch = pytest.importorskip("torch")

from lvlm_jax import cli  # noqa: E402
from lvlm_jax import params as P  # noqa: E402
from lvlm_jax.checkpoint import CheckpointError  # noqa: E402
from lvlm_jax.hub.convert import export_folder, import_folder  # noqa: E402
from lvlm_jax.hub.families import KINDS  # noqa: E402
from lvlm_jax.hub.npz import NpzFile  # noqa: E402
from lvlm_jax.hub.verify import verify  # noqa: E402
from tests.hub import npz_tiny, tiny  # noqa: E402

LAYOUTS = {"big_vision": False, "big_vision-scan": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved(tiny.perturbed(tiny.siglip()), tmp_path_factory.mktemp("siglip") / "hf")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_siglip_is_the_same_model_as_in_the_torch_librarys_folder(folder, tmp_path, layout, prefix):
    arrays = npz_tiny.siglip(folder, scan=LAYOUTS[layout])
    file = npz_tiny.save(tmp_path / "x.npz", arrays, prefix)
    loaded, reference = import_folder(file), import_folder(folder)
    assert (loaded.kind, loaded.layout, loaded.config) == ("dual", layout, reference.config)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, reference.params)
    flat = P.flatten(loaded.params)
    back = {row.theirs: np.asarray(row.save(flat)) for row in KINDS["dual"].rows(loaded.config, layout)}
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        assert (back[key].shape, back[key].dtype) == (array.shape, array.dtype), key
        assert back[key].tobytes() == np.ascontiguousarray(array).tobytes(), key


def test_bfloat16_scanned_and_out_again_for_the_torch_library(folder, tmp_path):
    arrays = {key: value.astype(ml_dtypes.bfloat16) for key, value in npz_tiny.siglip(folder, scan=True).items()}
    file = npz_tiny.save(tmp_path / "x.npz", arrays)
    assert {NpzFile(file).dtype(key) for key in arrays} == {np.dtype(ml_dtypes.bfloat16)}
    loaded = import_folder(file, scan=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.params["text"]["layers"]["mlp"]["up"]["kernel"].shape == (2, 32, 64)
    export_folder(tmp_path / "out", loaded.config, loaded.params)
    comparison = verify(file, tmp_path / "out")
    assert comparison.passed, str(comparison)


def test_verify_against_the_folder(folder, tmp_path):
    file = npz_tiny.save(tmp_path / "x.npz", npz_tiny.siglip(folder))
    comparison = verify(file, folder)
    assert comparison.passed, str(comparison)
    assert verify(file).passed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_picture_tower_out_of_a_file(folder, tmp_path, layout):
    file = npz_tiny.save(tmp_path / "x.npz", npz_tiny.siglip(folder, scan=LAYOUTS[layout]))
    tower, whole = import_folder(file, kind="vision"), import_folder(folder)
    assert tower.config == whole.config.vision
    jax.tree.map(np.testing.assert_array_equal, tower.params, whole.params["vision"])


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    """(the torch library's folder, the same as a flat file)"""
    root = tmp_path_factory.mktemp("paligemma")
    folder = tiny.saved(tiny.perturbed(tiny.paligemma()), root / "hf")
    return folder, npz_tiny.save(root / "x.npz", npz_tiny.paligemma(folder, heads=4, kv_heads=2))


def test_paligemma_is_the_same_model_as_in_the_torch_librarys_folder(paligemma):
    folder, file = paligemma
    loaded, reference = import_folder(file), import_folder(folder)
    assert (loaded.kind, loaded.layout, loaded.image_token_id) == ("lvlm", "big_vision-paligemma", 0)
    context = reference.config.llm.context  # no tensor tells it; every release has 8192
    llm = dataclasses.replace(loaded.config.llm, context=context, norm_eps=reference.config.llm.norm_eps)
    assert dataclasses.replace(loaded.config, llm=llm) == reference.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, reference.params)
    arrays, flat = NpzFile(file), P.flatten(loaded.params)
    back = {row.theirs: np.asarray(row.save(flat)) for row in KINDS["lvlm"].rows(loaded.config, loaded.layout)}
    assert back.keys() == set(arrays)
    for key in arrays:
        assert back[key].tobytes() == np.ascontiguousarray(arrays[key]).tobytes(), key
    scanned = import_folder(file, scan=True)
    jax.tree.map(np.testing.assert_array_equal, P.unstack_layers(scanned.params), reference.params)


def test_paligemma_gives_the_torch_librarys_numbers(paligemma):
    """Held against the folder that the file was made of, and against the one that we make of it."""
    folder, file = paligemma
    for theirs in (folder, None):
        comparison = verify(file, theirs)
        assert comparison.passed, str(comparison)
        assert [part.name for part in comparison.parts] == ["vision features", "connector", "hidden states", "logits"]


def test_the_command_makes_a_folder_of_it(paligemma, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", "export", str(paligemma[1]), str(out)]) == 0
    _, said = hf.PaliGemmaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    jax.tree.map(np.testing.assert_array_equal, import_folder(out).params, import_folder(paligemma[0]).params)


def test_paligemma_2_is_refused(paligemma, tmp_path):
    arrays = dict(NpzFile(paligemma[1])) | {"llm/layers/post_attention_norm/scale": np.zeros((2, 32), np.float32)}
    file = npz_tiny.save(tmp_path / "x.npz", arrays)
    with pytest.raises(CheckpointError, match=r"x.npz: .* a PaliGemma 2, whose soft-caps no tensor tells, is not read"):
        import_folder(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("img/MAPHead_0/LayerNorm_0/scale"), r"missing \(1\): img/MAPHead_0/LayerNorm_0/scale"),
        (lambda a: a.update({"img/odd": np.zeros(3)}), r"not used \(1\): img/odd"),
        (lambda a: a.pop("txt/pos_embedding"), "x.npz: txt/pos_embedding is missing; is it a whole checkpoint"),
        (
            lambda a: a.update({"t": np.zeros(2, np.float32)}),
            r"tensor 't' has shape \[2\], but config.json asks for \[1\]",
        ),
        (lambda a: [a.pop(k) for k in list(a) if k.startswith("txt/")], "none of its keys begins with txt/"),
        (lambda a: a.update({"img/pos_embedding": np.zeros((1, 15, 32))}), "has 15 places, which are no square"),
        (
            lambda a: a.update({"t": np.array([{}], dtype=object)}),
            r"params/t.npy holds Python objects, a pickle, which runs code when it is read, so it is refused",
        ),
        (lambda a: a.clear(), "holds no array; is it a checkpoint of big_vision"),
    ],
)
def test_files_that_are_refused(folder, tmp_path, change, message):
    arrays = npz_tiny.siglip(folder)
    change(arrays)
    file = npz_tiny.save(tmp_path / "x.npz", arrays, optimizer=False)
    with pytest.raises(CheckpointError, match=message):
        import_folder(file)


@pytest.mark.parametrize("keep", [100, -3000])
def test_a_file_cut_short(folder, tmp_path, keep):
    file = npz_tiny.save(tmp_path / "x.npz", npz_tiny.siglip(folder))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x.npz: not a whole .npz file .* fetch or copy it again"):
        import_folder(file)


def test_a_damaged_tensor(folder, tmp_path):
    arrays = npz_tiny.siglip(folder)
    file = npz_tiny.save(tmp_path / "x.npz", arrays)
    raw = bytearray(file.read_bytes())
    at = raw.index(arrays["txt/Embed_0/embedding"].tobytes()[:64])
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tensor 'txt/Embed_0/embedding' is damaged .*CRC"):
        import_folder(file)
