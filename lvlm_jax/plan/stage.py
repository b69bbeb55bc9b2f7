"""Compiles the very training step of a stage for devices nobody holds, and reads memory, work and time off it."""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax import assemble
from lvlm_jax import mesh as meshes
from lvlm_jax import params as trees
from lvlm_jax.config import ConfigError
from lvlm_jax.models.lvlm import LVLMConfig, dummy_batch
from lvlm_jax.nn import lora
from lvlm_jax.plan import hlo, nvidia
from lvlm_jax.plan.topology import Topology, devices_or_absent
from lvlm_jax.recipe import Recipe, StageRecipe
from lvlm_jax.train.program import Program
from lvlm_jax.train.stages import in_stage_dtype
from lvlm_jax.versions import versions

Wait = Callable[[str], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    trained, frozen, optimizer, batch, cache: what the step is given. peak: the most that stands at a time, all of that
    among it; of a program that does not fit, what the compiler says that it asked for; without a compiler only what is
    given. capacity: the published memory; of a program that does not fit, what the compiler says that there is.
    """

    trained: float
    frozen: float
    optimizer: float
    batch: float
    capacity: float
    cache: float = 0.0
    peak: float = 0.0

    @property
    def given(self) -> float:
        """All that the step is given."""
        return self.trained + self.frozen + self.optimizer + self.batch + self.cache

    @property
    def fits(self) -> bool:
        """Whether the program runs."""
        return self.peak <= self.capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage, or what gives answers, would be on a topology.

    stage: its name, or "prefill" or "decode". compiled: whether a compiler says so; else arithmetic does. Figures are
    of one device, but `model_flops`, `tokens` and `rows`.
    """

    recipe: str
    stage: str
    topology: Topology
    mesh: str
    remat: str
    rows: int
    tokens: int
    memory: Memory
    model_flops: float
    work: hlo.Work | None
    kernel_flops: float
    compiled: bool
    seconds: float
    versions: Mapping[str, str]

    @property
    def devices(self) -> int:
        """In all."""
        return self.topology.chips * self.topology.chip.devices

    @property
    def flops(self) -> float:
        """Of one device and step, kernels among them."""
        return (self.work.flops if self.work else 0.0) + self.kernel_flops

    @property
    def flops_ratio(self) -> float | None:
        """What is computed over what the model's own count asks for: recomputation, padding, replicas.

        None where it is not known: without a program, and for a step of decoding, whose products with single rows the
        compiler writes as sums.
        """
        if not self.work or not self.model_flops or self.memory.cache:
            return None
        return self.flops * self.devices / self.model_flops


def topology_recipe(recipe: Recipe) -> Recipe:
    """The recipe as it runs there: what "auto" chooses by device, chosen for accelerators."""
    chosen = {"dtype": "bfloat16", "scan": "yes"}
    return dataclasses.replace(recipe, **{name: chosen[name] for name in chosen if getattr(recipe, name) == "auto"})


def with_rows(stage: StageRecipe, shards: int, rows: int | None) -> StageRecipe:
    """The stage with so many rows a data shard; pictures a row stay as many, groups are one a shard.

    Raises:
      ConfigError: the recipe's rows or groups do not divide over the shards.
    """
    data = stage.data
    if rows is not None:
        total = rows * shards
        pictures = -(-data.pictures * total // data.rows // shards) * shards
        data = dataclasses.replace(data, rows=total, groups=shards, pictures=pictures)
    for name in ("rows", "groups"):
        if getattr(data, name) % shards:
            raise ConfigError(
                f"data.{name}={getattr(data, name)} does not divide over {shards} data shards; give --rows-per-shard, "
                f"or --config.stages.X.data.{name}= a multiple of {shards}"
            )
    return dataclasses.replace(stage, data=data)


def plan_stage(
    recipe: Recipe,
    name: str,
    topology: Topology,
    rows: int | None = None,
    wait: Wait = contextlib.nullcontext,
) -> Plan:
    """Compiles stage `name` of a recipe for a topology; by arithmetic where no compiler for it is installed.

    Args:
      rows: text rows a data shard; default the recipe's.
      wait: what is under way -> a context around it (`progress.waiting`).

    Raises:
      ConfigError: no such shape, or a mesh or batch that does not divide.
    """
    recipe = topology_recipe(recipe)
    mesh = recipe.make_mesh(devices_or_absent(topology))
    stage = with_rows(recipe.stages[name], mesh.size // mesh.shape["tensor"], rows)
    program, frozen, flops = stage_program(recipe, name, stage, mesh)
    data = stage.data
    shape = data.rows, data.length, data.pictures, data.groups
    batch = batch_of(recipe.model.lvlm, *shape, program.batch, assemble.blends(recipe, stage))
    held = Memory(
        trained=share(program.state.trained),
        frozen=share(frozen),
        optimizer=share(program.state) - share(program.state.trained),
        batch=share(batch),
        capacity=topology.memory,
    )
    lower = lambda: program.step.lower(program.state, frozen, batch)  # noqa: E731
    sizes = {"rows": data.rows, "tokens": data.rows * data.length, "model_flops": flops}
    return planned(recipe, name, topology, mesh, lower, wait, held=held, **sizes)


def planned(
    recipe: Recipe,
    name: str,
    topology: Topology,
    mesh: meshes.AnyMesh,
    lower: Callable[[], Any],
    wait: Wait,
    *,
    held: Memory,
    **sizes: Any,
) -> Plan:
    """The plan of a program that `lower` traces and that is given `held`; `sizes` are fields of `Plan`."""
    began, absent, work = time.perf_counter(), isinstance(mesh, jax.sharding.AbstractMesh), None
    if absent:
        memory = dataclasses.replace(held, peak=held.given)
    else:
        with meshes.use(mesh):
            with wait(f"traces {name} for {topology}"):
                lowered = lower()
            with wait(f"compiles {name} for {topology}: {mesh.size:,} devices"):
                peak, capacity, work = _compiled(lowered, held.capacity)
        memory = dataclasses.replace(held, peak=peak, capacity=capacity)
    return Plan(
        recipe=recipe.name,
        stage=name,
        topology=topology,
        mesh=recipe.mesh,
        remat=recipe.remat,
        memory=memory,
        work=work,
        kernel_flops=kernel_flops(work, recipe.model.attention) if work else 0.0,
        compiled=not absent,
        seconds=time.perf_counter() - began,
        versions=versions(("jax", "flax", "optax", *(("libtpu",) if topology.chip.tpu else nvidia.PACKAGES))),
        **sizes,
    )


def stage_program(recipe: Recipe, name: str, stage: StageRecipe, mesh: Any) -> tuple[Program, dict, float]:
    """(program, frozen tree, model FLOPs) of a stage: shapes with shardings, nothing computed."""
    model, _ = assemble.stage_model(recipe, stage)
    shapes, axes = assemble.stage_shapes(recipe, stage)
    what = stage.stage(name)
    mask = what.mask(shapes)
    flops = assemble.flops_of(recipe, stage, shapes) or 0.0
    running = jax.eval_shape(lambda p: in_stage_dtype(p, mask, assemble.dtype_of(recipe)), shapes)
    trained, frozen = trees.split(running, mask)
    if stage.lora and stage.lora.base:
        low = lora.split(trained)[1]
        frozen = jax.eval_shape(lambda p: lora.quantized(p, low, stage.lora.base), frozen)
    loss_fn = assemble.loss_of(stage, model, assemble.trains_head(recipe, mask), mesh)
    program = Program(what, loss_fn, trained, frozen, mesh, axes)
    at = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
    return program, jax.tree.map(at, frozen, program.frozen), flops


PRODUCTS = {"range_attention_forward": 2, "range_attention_backward_queries": 3, "range_attention_backward_keys": 4}
"""Matrix products of the attention kernels, each of 2 FLOPs a query, key and value of a head."""


def kernel_flops(work: hlo.Work, attention: str) -> float:
    """FLOPs of the attention kernels, which a program's text does not tell.

    Of text, causal attention is taken to see half of the keys, as the model's own count does (`train.flops`).
    """
    total = 0.0
    for one in work.kernels:
        if one.name not in PRODUCTS:
            raise ValueError(f"the kernel {one.name} has no count of its FLOPs; the kernels are {list(PRODUCTS)}")
        rows, heads, queries, width = next(shape for shape in one.shapes if len(shape) == 4)
        seen = queries / 2 if attention == "causal" and "/llm/" in one.path else queries
        total += one.count * PRODUCTS[one.name] * 2.0 * rows * heads * queries * seen * width
    return total


def batch_of(
    config: LVLMConfig, rows: int, length: int, pictures: int, groups: int, where: Any, blend: bool = False
) -> Any:
    """The shapes of a batch, every leaf lying as `where` says; blend: as `assemble.blends`."""
    whole = jax.eval_shape(lambda: dummy_batch(config, rows, length, pictures, blend))

    def grouped(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        shape = leaf.shape
        if path[0].name.startswith(("patch", "frames")):  # what travels in groups: [1, N, ...]
            shape = (groups, pictures // groups, *shape[2:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(grouped, whole)


def share(tree: Any) -> float:
    """Bytes of one device's part."""
    own = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize  # noqa: E731
    return float(sum(map(own, jax.tree.leaves(tree))))


def _compiled(lowered: Any, capacity: float) -> tuple[float, float, hlo.Work | None]:
    """(peak, capacity, work); a program that does not fit has a peak above the capacity, and no work."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        asked = _too_much(str(error))
        if asked is None:
            raise
        return *asked, None
    return _peak(compiled.memory_analysis()), capacity, _work(compiled)


def _peak(memory: Any) -> float:
    """The most that stands at a time; the GPU compiler of some versions gives its parts alone."""
    parts = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(memory.peak_memory_in_bytes or parts + memory.temp_size_in_bytes)


def _work(compiled: Any) -> hlo.Work | None:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # some programs cannot be printed by some versions of libtpu
        return None
    return hlo.read(text)


def _too_much(text: str) -> tuple[float, float] | None:
    """(bytes asked for, bytes there are) out of the compiler's error, None where it is another error."""
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    size = r"\(?([\d.]+)([KMGT])\)?"
    found = re.search(rf"{size} exceeds available HBM {size}", text) or re.search(rf"Used {size} of {size} hbm", text)
    if not found:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
