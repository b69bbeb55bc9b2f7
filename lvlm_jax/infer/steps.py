"""The compiled programs of generation: the prefill of prompts, and one step of decoding."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lvlm_jax import mesh as M
from lvlm_jax.infer import beam
from lvlm_jax.infer.grammar import PictureGrammar, Writing
from lvlm_jax.infer.sampling import Mode, choose
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.models.unified import Unified
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Array, Bool, Int, Params, pytree

Model = LVLM | Unified
"""What can be asked."""


@pytree
@dataclasses.dataclass(frozen=True)
class Place:
    """Where each row stands: its newest token and that token's position, its first cache slot, the slot to write.

    writing: where in a picture it is, for a model that writes pictures. written: the tokens of its answer, where those
    count (`Sampling.repetition_penalty`).
    """

    tokens: Int[Array, "B"]
    positions: Int[Array, "B"]
    start: Int[Array, "B"]
    index: Int[Array, ""]
    keys: Any  # a random key a row, None when greedy
    writing: Writing | None = None
    written: Bool[Array, "B V"] | None = None


def _pick(
    model: Model,
    mesh: Mesh | None,
    mode: Mode,
    params: Params,
    hidden: Array,
    keys: Any,
    at: Array,
    numbers: Any,
    grammar: PictureGrammar | None,
    writing: Writing | None,
    written: Array | None = None,
):
    """Tokens after the last of `hidden` [B, T, D]; only that position's logits exist. Whole on every device."""
    logits = model.apply({"params": params}, hidden[:, -1], method="logits")
    if grammar is not None:
        logits = jnp.where(grammar.allowed(writing, logits.shape[-1]), logits, -jnp.inf)
    if mode != "greedy":
        keys = jax.vmap(jax.random.fold_in)(keys, at)
    tokens = choose(logits, keys, mode, numbers, written)
    return tokens if mesh is None else jax.lax.with_sharding_constraint(tokens, NamedSharding(mesh, PartitionSpec()))


def _keep(mesh: Mesh | None, cache: Any) -> Any:
    """The cache cut over the mesh: rows over the data axes, heads over the tensor axis where they divide."""
    if mesh is None:
        return cache
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cache_sharding(mesh, x.shape)), cache)


def cache_sharding(mesh: M.AnyMesh, shape: Sequence[int]) -> NamedSharding:
    """How one array of a cache lies on a mesh: keys or values, or a number a row."""
    return NamedSharding(mesh, M.spec(mesh, ("batch", "kv_heads", None, None)[: len(shape)], shape))


@functools.partial(jax.jit, static_argnames=("model", "mesh", "mode", "room", "grammar"))
def prefill(
    model: Model,
    mesh: Mesh | None,
    mode: Mode,
    room: int,
    params: Params,
    batch: Batch,
    keys: Any,
    numbers: Any,
    grammar: PictureGrammar | None = None,
    left: Int[Array, ""] | None = None,
):
    """Prompts -> (cache with `room` more slots, the place after the first new token).

    grammar: which tokens may come where, in an answer of `left` tokens; None allows every one everywhere.
    """
    rows, length = batch.tokens.shape
    cache = _keep(mesh, model.apply({}, rows, length + room, method="new_cache"))
    hidden, cache = model.apply({"params": params}, batch, cache)
    positions = (batch.segments > 0).sum(axis=1, dtype=jnp.int32)
    writing = None if grammar is None else grammar.start(batch.tokens, batch.segments, left)
    tokens = _pick(model, mesh, mode, params, hidden, keys, positions, numbers, grammar, writing)
    writing = None if grammar is None else grammar.after(writing, tokens)
    written = None if numbers[-1] is None else _added(jnp.zeros((rows, model.config.vocab), bool), tokens)
    return _keep(mesh, cache), Place(tokens, positions, length - positions, jnp.int32(length), keys, writing, written)


def _added(written: Bool[Array, "B V"], tokens: Int[Array, "B"]) -> Bool[Array, "B V"]:
    return written.at[jnp.arange(len(tokens)), tokens].set(True)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "mode", "grammar"), donate_argnames=("cache",))
def decode(
    model: Model,
    mesh: Mesh | None,
    mode: Mode,
    params: Params,
    cache: Any,
    place: Place,
    numbers: Any,
    grammar: PictureGrammar | None = None,
):
    """One more token of every row. Rows that have ended go on; the host no longer listens."""
    hidden, cache = model.apply(
        {"params": params}, place.tokens[:, None], place.positions[:, None], place.start, cache, place.index,
        method="decode",
    )  # fmt: skip
    at = place.positions + 1
    tokens = _pick(model, mesh, mode, params, hidden, place.keys, at, numbers, grammar, place.writing, place.written)
    writing = None if grammar is None else grammar.after(place.writing, tokens)
    written = None if place.written is None else _added(place.written, tokens)
    return _keep(mesh, cache), Place(tokens, at, place.start, place.index + 1, place.keys, writing, written)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "mode", "ends", "room"))
def search(
    model: Model, mesh: Mesh | None, mode: beam.Mode, ends: tuple[int, ...], room: int,
    params: Params, batch: Batch, numbers: Any, max_new_tokens: Array,
) -> beam.Found:  # fmt: skip
    """Prompts -> their best answers by beam search; the whole of it is one program. Whole on every device."""
    rows, length = batch.tokens.shape
    run = functools.partial(model.apply, {"params": params})
    hidden, cache = run(batch, _keep(mesh, model.apply({}, rows, length + room, method="new_cache")))
    positions = (batch.segments > 0).sum(axis=1, dtype=jnp.int32)

    def step(tokens: Array, state: Any) -> tuple[Array, Any]:
        cache, positions, start, index = state
        hidden, cache = run(tokens[:, None], positions[:, None], start, cache, index, method="decode")
        return run(hidden[:, -1], method="logits"), (_keep(mesh, cache), positions + 1, start, index + 1)

    cache, *place = beam.repeated((cache, positions, length - positions, jnp.int32(length)), mode[0])
    found = beam.search(
        step, (_keep(mesh, cache), *place), run(hidden[:, -1], method="logits"), mode=mode, numbers=numbers, ends=ends,
        room=room, max_new_tokens=max_new_tokens, asked=positions > 0,
    )  # fmt: skip
    return found if mesh is None else jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))
