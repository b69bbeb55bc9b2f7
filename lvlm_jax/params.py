"""Parameter trees as plain nested dicts: paths, masks, splitting, and the two shapes of a stack of layers.

A path joins the keys with ``/``: ``llm/layers/0/attn/q/kernel``. On disk the layers of a stack are always apart
(``layers/0``, ``layers/1`` ...); a scanned model runs on one leaf with a leading axis L (``layers/...``).
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = "layers"


def flatten(tree: Mapping) -> dict[str, Any]:
    """Nested dict -> flat dict keyed by path, in sorted order (the order in which JAX flattens a dict)."""
    out = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            out.update({f"{key}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            out[str(key)] = value
    return out


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Flat dict keyed by path -> nested dict."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def parts(tree: Mapping) -> dict[str, Any]:
    """The parts of a model by name: its top-level branches, of ``senses`` each one (``senses/audio``)."""
    out = {}
    for name, branch in tree.items():
        out |= {f"{name}/{sense}": part for sense, part in branch.items()} if name == "senses" else {name: branch}
    return out


def only_in(some: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest paths that hold leaves of `some` and none of `others`, for a message that names few of many leaves.

    Elements that are numbers (layers of a stack) are one, ``*``.
    """
    named = lambda path: tuple("*" if element.isdigit() else element for element in path.split("/"))  # noqa: E731
    kept = {leaf[:end] for leaf in map(named, others) for end in range(1, len(leaf) + 1)}
    out = set()
    for leaf in {*map(named, some)}:
        if end := next((end for end in range(1, len(leaf) + 1) if leaf[:end] not in kept), None):
            out.add("/".join(leaf[:end]))
    return sorted(out)


@functools.cache
def _pattern(glob: str) -> re.Pattern:
    """``*`` matches within one path element, ``**`` any number of elements, ``{q,k}`` either of the words."""
    *before, last = glob.split("/")
    parts = []
    for element in before:
        parts.append(r"(?:[^/]+/)*" if element == "**" else f"{_element(element)}/")
    parts.append(r"(?:[^/]+/)*[^/]+" if last == "**" else _element(last))
    return re.compile("".join(parts))


def _element(glob: str) -> str:
    plain = re.escape(glob).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.sub(r"\\\{(.*?)\\\}", lambda words: f"(?:{words[1].replace(',', '|')})", plain)


def match(paths: Iterable[str], patterns: Iterable[str]) -> dict[str, bool]:
    """Which paths match any of the glob patterns.

    Raises:
      ValueError: a pattern that matches no path, with the nearest top-level names.
    """
    paths = list(paths)
    hit = dict.fromkeys(paths, False)
    for pattern in patterns:
        regex = _pattern(pattern)
        found = [path for path in paths if regex.fullmatch(path)]
        if not found:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3)
            tops = sorted({path.split("/")[0] for path in paths})
            raise ValueError(
                f"parameter pattern {pattern!r} matches nothing. The tree begins with {tops}; near: {near}. "
                "'*' stays within one path element, '**' spans several: 'llm/**', 'llm/layers/*/attn/**'."
            )
        hit.update(dict.fromkeys(found, True))
    return hit


def mask(tree: Mapping, patterns: Iterable[str]) -> dict:
    """Boolean tree of the same structure, True where a leaf's path matches a pattern.

    Patterns speak of layers one by one (``llm/layers/*/attn/**``) whichever shape the stack has.

    Raises:
      ValueError: a pattern that matches nothing, or one that takes only some layers of a scanned stack.
    """
    chosen = match(flatten(_apart_shapes(tree)), patterns)
    out = {}
    for path, leaf in flatten(tree).items():
        rows = {chosen[row] for row in layer_paths(path, leaf.shape) or [path]}
        if len(rows) > 1:
            raise ValueError(
                f"{path} is a scanned stack, which trains whole, but {list(patterns)} take some of its layers: "
                "set scan=False, or name every layer"
            )
        out[path] = rows.pop()
    return unflatten(out)


def split(tree: Mapping, mask: Mapping) -> tuple[dict, dict]:
    """(leaves whose mask is True, the others), both nested dicts without the branches that became empty."""
    flat, chosen = flatten(tree), flatten(mask)
    if flat.keys() != chosen.keys():
        raise ValueError(f"mask and tree differ at {sorted(flat.keys() ^ chosen.keys())[:5]}")
    picked = {path: leaf for path, leaf in flat.items() if chosen[path]}
    rest = {path: leaf for path, leaf in flat.items() if not chosen[path]}
    return unflatten(picked), unflatten(rest)


def merge(*trees: Mapping) -> dict:
    """Union of nested dicts with disjoint leaves; the inverse of `split`."""
    flat: dict = {}
    for tree in trees:
        part = flatten(tree)
        if both := flat.keys() & part.keys():
            raise ValueError(f"the same leaf stands in two trees: {sorted(both)[:5]}")
        flat.update(part)
    return unflatten(flat)


def size(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shape structs."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating leaves in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def add_rows(x: jax.Array, count: int, axis: int) -> jax.Array:
    """A vocabulary's table with `count` more rows, each the mean of the old ones: where LLaVA starts new words."""
    mean = jnp.mean(x.astype(jnp.float32), axis=axis, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, count, axis=axis)], axis=axis)


# ---------------------------------------------------------------------------------------------------------------------
# The two shapes of a stack of layers


def layer_paths(path: str, shape: tuple[int, ...]) -> list[str] | None:
    """The paths, layers apart, of a leaf of a scanned stack (``layers/x``: ``layers/0/x`` ...); else None."""
    head, found, tail = f"/{path}".partition(f"/{LAYERS}/")
    if not found or tail.split("/")[0].isdigit():
        return None
    return [f"{head}/{LAYERS}/{i}/{tail}"[1:] for i in range(shape[0])]


def stack_path(path: str) -> tuple[str, int | None]:
    """(path in a scanned stack, layer): ``llm/layers/3/norm/scale`` -> (``llm/layers/norm/scale``, 3), else None."""
    head, found, tail = f"/{path}".partition(f"/{LAYERS}/")
    index, _, rest = tail.partition("/")
    return (f"{head}/{LAYERS}/{rest}"[1:], int(index)) if found and index.isdigit() else (path, None)


def _apart(layers: Mapping) -> bool:
    return all(str(key).isdigit() for key in layers)


def is_stacked(tree: Any) -> bool:
    """Whether any stack in the tree is a scanned one."""
    if not isinstance(tree, Mapping):
        return False
    return any((k == LAYERS and not _apart(v)) or is_stacked(v) for k, v in tree.items() if isinstance(v, Mapping))


def _map_layers(tree: Any, change: Callable[[Mapping], Mapping]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {k: change(v) if k == LAYERS and isinstance(v, Mapping) else _map_layers(v, change) for k, v in tree.items()}


def stack_layers(tree: Mapping) -> dict:
    """``layers/0/x, layers/1/x, ...`` -> ``layers/x`` with a leading axis L; stacks already scanned are left alone."""

    def change(layers: Mapping) -> Mapping:
        if not _apart(layers):
            return layers
        rows = [layers[str(i)] for i in range(len(layers))]
        return jax.tree.map(lambda *leaves: _stack(leaves), *rows)

    return _map_layers(tree, change)


def _stack(leaves: tuple) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    return (np if isinstance(first, np.ndarray) else jnp).stack(leaves)


def unstack_layers(tree: Mapping) -> dict:
    """``layers/x`` with a leading axis L -> ``layers/0/x, layers/1/x, ...``: the layout on disk and for decoding."""
    return _map_layers(tree, _unstack)


def _apart_shapes(tree: Mapping) -> dict:
    return unstack_layers(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(tree)))


def _unstack(layers: Mapping) -> Mapping:
    if _apart(layers):
        return layers
    depth = jax.tree.leaves(layers)[0].shape[0]
    return {str(i): jax.tree.map(lambda x, i=i: _row(x, i), layers) for i in range(depth)}


def _row(x: Any, i: int) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[i]
