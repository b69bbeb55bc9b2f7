"""A stack of equal layers in two shapes: scanned (one compiled body) and per layer.

Scanned compiles once whatever the depth, which pods want; per layer is faster on a CPU and when decoding. The
parameters of one become those of the other by `params.stack_layers` and `params.unstack_layers`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.mesh import constrain
from lvlm_jax.nn.ranges import KEPT
from lvlm_jax.shapes import Params

_SAVE = jax.checkpoint_policies
_ATTENTION = _SAVE.save_only_these_names(KEPT)

REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": _SAVE.nothing_saveable,
    "attention": _ATTENTION,
    "dots": _SAVE.save_from_both_policies(_SAVE.dots_with_no_batch_dims_saveable, _ATTENTION),
}
"""What the backward pass keeps of a layer, by name.

none: everything. full: nothing, all of the layer runs twice but its last product. attention: what attention gave, so
that its cost, which grows with the square of the length, is paid once. dots: that, and the outputs of the matrix
products with weights; norms, activations and rotations run twice.
"""
STREAM = ("batch", "length", None)
"""The axes of what passes from layer to layer."""


class Layers(nn.Module):
    """A stack applied one by one: children named 0, 1, 2 ..., of which those in `run` are applied."""

    block: functools.partial
    depth: int

    @nn.compact
    def __call__(
        self, x: Any, per_layer: Any, run: range, *shared: Any, before: Callable[[int, Any], Any] | None = None
    ) -> tuple[Any, Any]:
        outs = []
        before = before or (lambda i, x: x)
        for i in range(self.depth):
            if i not in run and not self.is_initializing():
                continue
            x = before(i, x)
            y, out = self.block(name=str(i))(x, None if per_layer is None else per_layer[i], *shared)
            x = constrain(y, STREAM) if i in run else x
            outs.append(out)
        return before(self.depth, x), tuple(outs)


def make_stack(
    block: functools.partial, depth: int, scan: bool = False, remat: str = "none", name: str | None = None
) -> nn.Module:
    """`depth` copies of a block, to be applied by `run_stack`. Name it "layers", so that `params` knows the stack.

    Args:
      block: ``functools.partial(Module, ...)`` of a module called as ``(x, per_layer_value, *shared) -> (x, out)``.
      scan: scanned or per layer.
      remat: a key of `REMAT`.
    """
    if remat not in REMAT:
        raise ValueError(f"unknown remat policy {remat!r}; the policies are {', '.join(REMAT)}")
    if not scan:
        return Layers(functools.partial(_remat(block.func, remat, scan=False), **block.keywords), depth, name=name)
    scanned = nn.scan(
        _remat(_row(block.func), remat, scan=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(**block.keywords, name=name)


def run_stack(
    stack: nn.Module,
    depth: int,
    x: Any,
    per_layer: Any = None,
    *shared: Any,
    take: int | None = None,
    before: Callable[[int, Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Runs the first `take` layers (default all) of a stack from `make_stack`.

    Args:
      per_layer: one value a layer (a tuple; when scanned, a tree with a leading axis L), or None.
      shared: what every layer gets alike.
      before: what else runs before layer i, and with i = depth behind the last: (i, x) -> x. Only where layers run one
        by one; scanned ones are woven (`weave`).

    Returns:
      (x, outs): the last output, and each layer's second output (a tuple, or a tree with a leading axis L).
    """
    take = depth if take is None else take
    x = constrain(x, STREAM)
    if isinstance(stack, Layers):
        return stack(x, per_layer, range(take), *shared, before=before)
    if before is not None:
        raise ValueError("nothing can run between the layers of a scanned stack; weave the two (nn.stack.weave)")
    return stack(x, (jnp.arange(depth) < take, per_layer), shared)


class Opened(NamedTuple):
    """A scanned stack laid open: its block, its parameters and per-layer values (leading axis L), what is shared."""

    block: functools.partial
    params: Params
    per_layer: Any
    shared: tuple
    remat: str = "none"

    def layer(self, x: Any, row: tuple[Params, Any]) -> tuple[Any, Any]:
        """One layer of it."""

        def run(x: Any, row: tuple[Params, Any]) -> tuple[Any, Any]:
            module = self.block.func(**self.block.keywords, parent=None)
            return module.apply({"params": row[0]}, x, row[1], *self.shared)

        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[self.remat], prevent_cse=False)
        y, out = run(x, row)
        return constrain(y, STREAM), out


def weave(layers: Opened, others: Opened, every: int, at: int, x: Any) -> tuple[Any, Any, Any]:
    """Two scanned stacks as one scan over groups: `every` layers, and one of the others before layer `at` of them.

    With `at` = `every` it stands behind the last. Layers that are left over follow one by one, with one of the others
    among them where one is left over, too.

    Returns:
      (x, outs of the layers, outs of the others), the outs with their stacks' leading axis.
    """
    depth, blocks = (len(jax.tree.leaves(stack.params)[0]) for stack in (layers, others))
    whole, rest = divmod(depth, every)
    cut = lambda tree, where: jax.tree.map(lambda leaf: leaf[where], tree)  # noqa: E731
    mine, own = (layers.params, layers.per_layer), (others.params, others.per_layer)
    left, own = (cut(mine, slice(whole * every, None)), cut(own, slice(whole))) if rest else (None, own)
    last = cut((others.params, others.per_layer), whole) if blocks > whole else None
    mine = cut(mine, slice(whole * every)) if rest else mine
    groups = jax.tree.map(lambda leaf: leaf.reshape(whole, every, *leaf.shape[1:]), mine)

    def group(x: Any, row: tuple, count: int = every) -> tuple[Any, Any]:
        mine, other, outs, extra = *row, [], None
        for i in range(count + 1):
            if i == at and other is not None:
                x, extra = others.layer(x, other)
            if i < count:
                x, out = layers.layer(x, cut(mine, i))
                outs.append(out)
        return x, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs), extra)

    x, (outs, extra) = jax.lax.scan(group, constrain(x, STREAM), (groups, own))
    outs = jax.tree.map(lambda leaf: leaf.reshape(whole * every, *leaf.shape[2:]), outs)
    if rest:
        x, (more, one) = group(x, (left, last), rest)
        join = lambda *leaves: jnp.concatenate(leaves)  # noqa: E731
        outs = jax.tree.map(join, outs, more)
        extra = extra if last is None else jax.tree.map(lambda leaf, new: join(leaf, new[None]), extra, one)
    return x, outs, extra


def _row(base: type[nn.Module]) -> type[nn.Module]:
    class Row(base):
        """One layer of a scan; a layer that does not run hands its input on."""

        def __call__(self, x: Any, row: tuple, shared: tuple) -> tuple[Any, Any]:
            runs, value = row
            y, out = base.__call__(self, x, value, *shared)
            return constrain(jnp.where(runs, y, x), STREAM), out

    return Row


def _remat(block: type[nn.Module], policy: str, scan: bool) -> type[nn.Module]:
    if policy == "none":
        return block
    # A scan's body cannot be merged with its own recomputation, so there CSE need not be held off.
    return nn.remat(block, policy=REMAT[policy], prevent_cse=not scan)
