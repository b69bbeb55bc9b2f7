"""Compiles what gives answers (`infer.steps`): the prefill of prompts, and one step of decoding."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax import assemble
from lvlm_jax import mesh as meshes
from lvlm_jax.config import ConfigError
from lvlm_jax.infer import steps
from lvlm_jax.infer.sampling import Sampling
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.nn.linear import abstract
from lvlm_jax.plan.stage import Memory, Plan, Wait, batch_of, planned, share, topology_recipe
from lvlm_jax.plan.topology import Topology, devices_or_absent
from lvlm_jax.recipe import Model, Recipe
from lvlm_jax.shapes import Params
from lvlm_jax.train.flops import step_flops

PROGRAMS = ("prefill", "decode")
ROOM = 64
"""Slots of the cache behind the prompt."""


def plan_answers(
    recipe: Recipe,
    program: str,
    topology: Topology,
    rows: int = 1,
    length: int | None = None,
    wait: Wait = contextlib.nullcontext,
) -> Plan:
    """Compiles one of `PROGRAMS` for a topology, weights and cache in the recipe's compute dtype.

    Args:
      rows: prompts a data shard, each with one picture.
      length: positions of a prompt; default what the context leaves beside `ROOM` new tokens.
      wait: what is under way -> a context around it (`progress.waiting`).

    Raises:
      ConfigError: no such shape, a mesh that does not divide, a prompt beyond the context, or an encoder-decoder.
    """
    recipe = dataclasses.replace(topology_recipe(recipe), remat="none")
    if not isinstance(recipe.model, Model):
        raise ConfigError(f"--program {program} is of vision-language models; {recipe.name} trains another kind")
    config = recipe.model.lvlm
    if config.two_stacks:
        raise ConfigError(
            f"model.llm is an encoder-decoder, whose {program} is not planned: its two stacks run over unlike lengths; "
            "lvlm plan compiles the training step of such a recipe"
        )
    most = config.llm.context - ROOM
    length = most if length is None else length
    if not 0 < length <= most:
        raise ConfigError(f"--length={length}: from 1 to {most}, the context without room for {ROOM} new tokens")
    mesh = recipe.make_mesh(devices_or_absent(topology))
    shards = meshes.data_shards(mesh)
    rows *= shards
    model = LVLM(config, dtype=assemble.dtype_of(recipe), scan=False)
    params = _weights(model, mesh)
    flops = model_flops(config, params, program, rows, length)
    numbers = jax.eval_shape(lambda: Sampling().numbers)
    static = model, mesh, "greedy"
    if program == "prefill":
        whole = functools.partial(dummy_batch, config, rows, length, rows)
        batch = batch_of(whole, rows * config.vision.frames, shards, meshes.batch_sharding(mesh))
        held = {"frozen": share(params), "batch": share(batch)}
        lower = functools.partial(steps.prefill.lower, *static, ROOM, params, batch, None, numbers)
    else:
        params = {part: params[part] for part in config.decoding}
        cache, place = _kept(model, mesh, rows, length + ROOM, shards)
        held = {"frozen": share(params), "batch": share(place), "cache": share(cache)}
        lower = functools.partial(steps.decode.lower, *static, params, cache, place, numbers)
    memory = Memory(trained=0.0, optimizer=0.0, capacity=topology.memory, **held)
    sizes = {"rows": rows, "tokens": rows * (length if program == "prefill" else 1), "model_flops": flops}
    return planned(recipe, program, topology, mesh, lower, wait, held=memory, **sizes)


def model_flops(config: LVLMConfig, params: Params, program: str, rows: int, length: int) -> float:
    """2N a token, and attention over the keys that are seen; of a prompt the head reads the last position alone."""
    still = jax.tree.map(lambda leaf: False, params)
    llm = config.llm
    if program == "prefill":
        total = step_flops(config, params, still, rows=rows, length=length, pictures=rows * config.vision.frames)
        return total - 2.0 * rows * (length - 1) * llm.width * llm.vocab
    total = step_flops(config, params, still, rows=rows, length=1, pictures=0)
    return total + 4.0 * rows * (length + ROOM) * llm.depth * llm.heads * llm.head_width


def _weights(model: LVLM, mesh: Any) -> Params:
    shapes, axes = abstract(model, dummy_batch(model.config))
    at = meshes.shardings(mesh, axes, shapes)
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, model.dtype, sharding=at), shapes, at)


def _kept(model: LVLM, mesh: Any, rows: int, slots: int, groups: int) -> tuple[Any, steps.Place]:
    """(shapes of a cache of so many slots, shapes of where each row stands)."""
    row = functools.partial(jnp.zeros, rows, jnp.int32)
    cache = jax.eval_shape(lambda: model.apply({}, rows, slots, groups, rows // groups, method="new_cache"))
    place = jax.eval_shape(lambda: steps.Place(row(), row(), row(), jnp.int32(0), None))
    whole = jax.NamedSharding(mesh, jax.P())
    at = lambda where: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x))  # noqa: E731
    lay = at(lambda x: steps.cache_sharding(mesh, x.shape))
    return jax.tree.map(lay, cache), jax.tree.map(at(lambda x: whole), place)
