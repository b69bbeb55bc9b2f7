import numpy as np
import pytest

from lvlm_jax import keymap
from lvlm_jax.keymap import SCALAR, TRANSPOSE, Row, check, dense, joined, layer_norm, patches

RNG = np.random.default_rng(0)
ROWS = [*dense("up", "fc1", bias=True), *layer_norm("norm", "ln"), Row("scale", "logit_scale", SCALAR)]
OURS = ["up/kernel", "up/bias", "norm/scale", "norm/bias", "scale"]
THEIRS = ["fc1.weight", "fc1.bias", "ln.weight", "ln.bias", "logit_scale"]


def test_rows_that_cover_both_sides():
    check(ROWS, OURS, THEIRS, "folder")
    assert [row.theirs for row in ROWS] == THEIRS
    assert [leaf for row in ROWS for leaf in row.leaves] == OURS


def test_keys_that_are_missing_or_left_over_are_listed():
    with pytest.raises(ValueError, match=r"folder: this checkpoint does not fit the model") as caught:
        check(ROWS, OURS, [*THEIRS[1:], "extra.weight", "extra.bias"], "folder")
    text = str(caught.value)
    assert "missing (1): fc1.weight\n" in text
    assert "not used (2): extra.bias, extra.weight\n" in text
    assert "Is it another size, family or layout than its config.json says, or are files of it absent?" in text


def test_a_long_list_is_cut_with_its_number():
    with pytest.raises(ValueError, match=r"not used \(30\): .* \.\.\. and 18 more"):
        check(ROWS, OURS, [*THEIRS, *(f"x{i:02}" for i in range(30))], "folder")
    with pytest.raises(ValueError, match=r"missing \(5\): .*\n  not used \(0\): none"):
        check(ROWS, OURS, [], "folder")


@pytest.mark.parametrize("ours", [OURS[1:], [*OURS, "gate/kernel"]])
def test_a_table_that_is_not_the_models_is_our_mistake(ours):
    with pytest.raises(
        ValueError, match=r"key table and the model disagree at (up/kernel|gate/kernel): the table of this"
    ):
        check(ROWS, ours, THEIRS, "folder")


CHANGES = {
    "transpose": (TRANSPOSE, (3, 5), [(5, 3)]),
    "scalar": (SCALAR, (1,), [()]),
    "patches": (patches(2), (7, 3, 2, 2), [(12, 7)]),
    "thirds": (joined(3, TRANSPOSE), (12, 5), [(5, 4)] * 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_and_back(name):
    change, shape, ours = CHANGES[name]
    paths = tuple(f"leaf{i}" for i in range(len(ours)))
    row = Row(paths[0] if len(paths) == 1 else paths, "theirs", change)
    tensor = RNG.normal(size=shape).astype(np.float32)
    leaves = row.load(tensor)
    assert [leaf.shape for leaf in leaves.values()] == ours
    np.testing.assert_array_equal(row.save(leaves), tensor)


def test_patches_are_rows_columns_channels():
    kernel = RNG.normal(size=(7, 3, 2, 2)).astype(np.float32)
    picture = RNG.normal(size=(2, 2, 3)).astype(np.float32)
    expected = np.einsum("dcij,ijc->d", kernel, picture)
    np.testing.assert_allclose(picture.reshape(-1) @ patches(2).load(kernel), expected, rtol=1e-5)


def test_a_row_of_three_leaves_needs_three():
    with pytest.raises(ValueError, match="zip"):
        Row(("q", "k"), "qkv", joined(3)).load(np.zeros((6, 2)))


def test_fields_of_a_public_config():
    assert keymap.fields({"a": 1, "b": None}, {"b": 2, "c": 3}) == {"a": 1, "b": 2, "c": 3}
    assert keymap.one_of("x", 1, [1, 2]) == 1
    with pytest.raises(
        ValueError, match=r"config.json: hidden_act is 'mish', which is not supported; supported: 'quick_gelu',"
    ):
        keymap.activation("hidden_act", "mish")
    assert keymap.activation("hidden_act", "gelu_pytorch_tanh") == "gelu_tanh"
    assert set(keymap.PUBLIC_ACTIVATIONS) == set(keymap.ACTIVATIONS.values())
    assert (keymap.square("image_size", 14), keymap.square("image_size", [14, 14])) == (14, 14)
    with pytest.raises(
        ValueError, match=r"image_size is \[14, 16\], which is not supported; supported: one side of a square"
    ):
        keymap.square("image_size", [14, 16])
