import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import params as P

PATHS = [
    "connector/up/bias",
    "connector/up/kernel",
    "llm/embed/table",
    "llm/layers/0/attn/q/kernel",
    "llm/layers/0/mlp/up/kernel",
    "llm/layers/1/attn/q/kernel",
    "llm/layers/1/mlp/up/kernel",
    "llm/layers/10/mlp/up/kernel",
    "vision/embed",
]


def tree(depth=3):
    """Layers one by one, every value different."""
    at = iter(range(10_000))
    leaf = lambda *shape: jnp.asarray(np.arange(int(np.prod(shape))).reshape(shape) + 100 * next(at), jnp.float32)  # noqa: E731
    layers = {str(i): {"attn": {"q": {"kernel": leaf(2, 3)}}, "norm": {"scale": leaf(3)}} for i in range(depth)}
    return {"connector": {"kernel": leaf(3, 2)}, "llm": {"embed": {"table": leaf(5, 2)}, "layers": layers}}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_flatten_and_back():
    flat = P.flatten(tree())
    assert list(flat)[:3] == ["connector/kernel", "llm/embed/table", "llm/layers/0/attn/q/kernel"]
    same(P.unflatten(flat), tree())
    for path, leaf in zip(flat, jax.tree.leaves(tree()), strict=True):
        np.testing.assert_array_equal(flat[path], leaf)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", PATHS),
        ("connector/**", PATHS[:2]),
        ("*/*/kernel", PATHS[1:2]),
        ("**/kernel", [p for p in PATHS if p.endswith("kernel")]),
        ("llm/layers/*/attn/**", [PATHS[3], PATHS[5]]),
        ("llm/layers/1/**", [PATHS[5], PATHS[6]]),
        ("llm/layers/?/mlp/up/kernel", [PATHS[4], PATHS[6]]),
        ("llm/**/up/*", [PATHS[4], PATHS[6], PATHS[7]]),
        ("vision/embed", PATHS[8:]),
        ("vision/**", PATHS[8:]),
    ],
)
def test_match(pattern, expected):
    assert [path for path, hit in P.match(PATHS, [pattern]).items() if hit] == expected


@pytest.mark.parametrize("pattern", ["conector/**", "connector", "llm/*/kernel", "llm/layers/2/**", "*", "", "embed"])
def test_a_pattern_that_matches_nothing(pattern):
    with pytest.raises(
        ValueError, match=r"parameter pattern '.*' matches nothing. The tree begins with \['connector',"
    ):
        P.match(PATHS, ["connector/**", pattern])


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError, match=r"near: \['connector/up/kernel'"):
        P.match(PATHS, ["connector/up/kernels"])


def test_patterns_add_up():
    hit = P.match(PATHS, ["connector/**", "vision/**"])
    assert [path for path, on in hit.items() if on] == [*PATHS[:2], PATHS[8]]
    assert list(hit) == PATHS


@pytest.mark.parametrize("patterns", [["connector/**"], ["llm/layers/*/norm/**"], ["llm/layers/**"], ["**"]])
def test_a_mask_speaks_of_layers_one_by_one_in_both_shapes(patterns):
    apart = P.mask(tree(), patterns)
    scanned = P.mask(P.stack_layers(tree()), patterns)
    assert jax.tree.structure(apart) == jax.tree.structure(tree())
    assert jax.tree.structure(scanned) == jax.tree.structure(P.stack_layers(tree()))
    assert all(type(on) is bool for on in jax.tree.leaves((apart, scanned)))
    rows = {
        path.replace("/0/", "/"): on for path, on in P.flatten(apart).items() if "/1/" not in path and "/2/" not in path
    }
    assert P.flatten(scanned) == rows


def test_some_layers_of_a_scanned_stack():
    assert sum(jax.tree.leaves(P.mask(tree(), ["llm/layers/1/**"]))) == 2
    with pytest.raises(
        ValueError, match=r"is a scanned stack, which trains whole, but \['llm/layers/1/\*\*'\] take some"
    ):
        P.mask(P.stack_layers(tree()), ["llm/layers/1/**"])
    every = [f"llm/layers/{i}/norm/scale" for i in range(3)]
    assert sum(jax.tree.leaves(P.mask(P.stack_layers(tree()), every))) == 1


def test_a_mask_needs_shapes_only():
    shapes = jax.eval_shape(lambda: P.stack_layers(tree()))
    assert P.mask(shapes, ["llm/**"]) == P.mask(P.stack_layers(tree()), ["llm/**"])


@pytest.mark.parametrize("change", [lambda t: t, P.stack_layers])
def test_split_and_merge_are_inverse(change):
    whole = change(tree())
    picked, rest = P.split(whole, P.mask(whole, ["connector/**", "llm/layers/*/norm/**"]))
    assert set(picked) == {"connector", "llm"}
    assert set(rest) == {"llm"}
    assert "norm" not in str(P.flatten(rest).keys())
    same(P.merge(picked, rest), whole)
    same(P.merge(rest, picked), whole)
    everything, nothing = P.split(whole, P.mask(whole, ["**"]))
    assert nothing == {}
    same(everything, whole)


def test_split_and_merge_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"mask and tree differ at \['llm/embed/table'"):
        P.split(tree(), {"connector": {"kernel": True}})
    with pytest.raises(ValueError, match=r"the same leaf stands in two trees: \['connector/kernel'\]"):
        P.merge(tree(), {"connector": {"kernel": 1}})


def test_stack_and_unstack_are_inverse():
    scanned = P.stack_layers(tree())
    assert scanned["llm"]["layers"]["attn"]["q"]["kernel"].shape == (3, 2, 3)
    assert P.is_stacked(scanned)
    assert not P.is_stacked(tree())
    same(P.unstack_layers(scanned), tree())
    same(P.stack_layers(scanned), scanned)
    same(P.unstack_layers(tree()), tree())


def test_the_tenth_layer_comes_after_the_ninth():
    kernels = P.stack_layers(tree(depth=12))["llm"]["layers"]["norm"]["scale"]
    apart = tree(depth=12)["llm"]["layers"]
    for i in range(12):
        np.testing.assert_array_equal(kernels[i], apart[str(i)]["norm"]["scale"])


def test_stacking_of_shapes_and_of_numpy():
    shapes = jax.eval_shape(tree)
    assert jax.tree.map(lambda x: x.shape, P.stack_layers(shapes)) == jax.tree.map(
        lambda x: x.shape, P.stack_layers(tree())
    )
    assert P.unstack_layers(P.stack_layers(shapes)) == shapes
    host = jax.tree.map(np.asarray, tree())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(P.stack_layers(host)))


def test_stacking_inside_a_compiled_function():
    same(jax.jit(lambda t: P.unstack_layers(P.stack_layers(t)))(tree()), tree())


def test_size_and_cast():
    mixed = {"a": jnp.ones((2, 3)), "b": jnp.ones(4, jnp.int32)}
    assert P.size(mixed) == 10
    assert P.size(jax.eval_shape(lambda: mixed)) == 10
    low = P.cast(mixed, jnp.bfloat16)
    assert (low["a"].dtype, low["b"].dtype) == (jnp.bfloat16, jnp.int32)
