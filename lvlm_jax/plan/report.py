"""What a plan says: memory, work, an estimate of time, and what to change where it does not fit."""

import dataclasses
from typing import Any

from lvlm_jax.chips import GB, GIB, TF
from lvlm_jax.plan.hlo import Collective
from lvlm_jax.plan.stage import Plan
from lvlm_jax.plan.topology import no_compiler

SMALL = 0.1
"""Where the largest figure of a table is below so much of its unit, the next smaller unit is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds that one step takes at least, were each of these at its published peak and all at the same time.

    An estimate from published figures, not a measurement: no program reaches them. network: between slices; 0 where
    there is one slice, or where the chip's maker publishes no figure.
    """

    compute: float
    memory: float
    links: float
    network: float = 0.0

    @property
    def step(self) -> float:
        """The longest of them."""
        return max(self.compute, self.memory, self.links, self.network)


def roofline(plan: Plan) -> Roofline | None:
    """From FLOPs, what the step is given, and what it exchanges; None where the compiler gave no program to read.

    FLOPs are the model's own where those of the program are not known (by arithmetic exchanges are not known either).
    """
    if plan.work is None and plan.compiled:
        return None
    chip, memory, slices = plan.topology.chip, plan.memory, plan.topology.slices
    ways = lambda one: len(one.groups[0]) if one.groups else plan.devices // slices  # noqa: E731
    sent = sum(_sent(one, ways(one)) for one in plan.work.collectives) if plan.work else 0.0
    crossed = sum(_sent(one, slices) for one in plan.work.between) if plan.work else 0.0
    return Roofline(
        compute=max(plan.flops, plan.model_flops / plan.devices) * chip.devices / chip.flops,
        memory=memory.given * chip.devices / chip.bandwidth,
        links=sent * chip.devices / chip.links,
        network=crossed * chip.devices / chip.network if chip.network else 0.0,
    )


def _sent(one: Collective, ways: int) -> float:
    """Bytes that a device of `ways` sends at least; to reduce and give all the result is to go around twice."""
    return one.bytes * (ways - 1) / ways * (2 if one.kind == "all-reduce" else 1)


def text(plan: Plan) -> str:
    """The plan as a table."""
    memory, topology = plan.memory, plan.topology
    unit, size = ("MiB", GIB / 1024) if memory.peak < SMALL * GIB else ("GiB", GIB)
    lines = [
        f"{plan.recipe}, {plan.stage}, on {topology}: {topology.chips:,} chips, mesh {plan.mesh}, "
        f"remat {plan.remat}, {plan.rows:,} rows of {plan.tokens // plan.rows:,} positions a step",
        _source(plan),
        "",
        f"memory of a device, {unit}",
    ]
    for name in ("trained", "optimizer", "frozen", "batch", *(["cache"] if memory.cache else [])):
        lines.append(_row(name, getattr(memory, name) / size, ".2f"))
    fits = "fits" if memory.fits else "DOES NOT FIT"
    if plan.compiled:
        lines.append(_row("activations and copies", max(0.0, memory.peak - memory.given) / size, ".2f"))
    elif memory.fits:
        fits = "before activations, which only a compiler tells"
    label = "peak" if plan.compiled else "in all, at least"
    lines.append(f"{_row(label, memory.peak / size, '.2f')}  of {memory.capacity / size:.2f}, {fits}")
    if not memory.fits:
        return "\n".join([*lines, "", f"what to change: {advice(plan)}"])
    return "\n".join([*lines, *_work(plan)])


def _source(plan: Plan) -> str:
    if not plan.compiled:
        return f"by arithmetic: {no_compiler(plan.topology.chip)}"
    return f"compiled in {plan.seconds:.0f} s by {_versions(plan)}"


def _versions(plan: Plan) -> str:
    return ", ".join(f"{name} {version}" for name, version in plan.versions.items() if version != "absent")


def _work(plan: Plan) -> list[str]:
    roof = roofline(plan)
    if roof is None:
        return ["", "FLOPs, exchanges and times: not available, this compiler cannot print this program"]
    lines = ["", "work of a device and step"] if plan.work or plan.model_flops else []
    most = max(plan.flops, plan.model_flops / plan.devices)
    unit, size = ("GF", TF / 1000) if most < SMALL * TF else ("TF", TF)
    if plan.work and not plan.memory.cache:
        lines.append(_row(f"FLOPs compiled, {unit}", plan.flops / size, ".2f"))
    if plan.model_flops:
        lines.append(_row(f"FLOPs of the model, {unit}", plan.model_flops / plan.devices / size, ".2f"))
    if plan.flops_ratio:
        lines.append(_row("compiled over model", plan.flops_ratio, ".3f"))
    if plan.work:
        for kind in sorted({one.kind for one in plan.work.collectives}):
            lines.append(_row(f"{kind}, GB", plan.work.bytes_of(kind) / GB, ".2f"))
        for one in plan.work.between:
            lines.append(_row(f"between slices: {one.kind}, GB", one.bytes / GB, ".2f"))
    return lines + _times(plan, roof)


def _times(plan: Plan, roof: Roofline) -> list[str]:
    apart = "" if plan.work else "; recomputation and exchanges are not in it"
    lines = ["", f"a step at the published peaks, an estimate and no measurement{apart}"]
    unit, size = ("ms", 1e-3) if roof.step < 1e-3 else ("s", 1.0)
    known = {"compute": roof.compute, "memory": True, "links": plan.work, "network": roof.network}
    for name in (name for name, found in known.items() if found):
        lines.append(_row(f"{name}, {unit}", getattr(roof, name) / size, ".4f"))
    lines.append(_row(f"step, {unit}, at least", roof.step / size, ".4f"))
    lines.append(_row("tokens/s/chip, at most", plan.tokens / roof.step / plan.topology.chips, ",.0f"))
    if plan.model_flops and plan.work:  # by arithmetic nothing is known that could keep it from 100 %
        peak = plan.topology.chip.flops * plan.topology.chips
        lines.append(_row("MFU, at most", plan.model_flops / roof.step / peak, ".1%"))
    return lines


def _row(name: str, value: float, form: str) -> str:
    return f"  {name:<34}{value:>15{form}}"


def advice(plan: Plan) -> str:
    """The next thing to change where a program does not fit."""
    if not plan.memory.optimizer:
        return "fewer rows, more chips, or both cut over more of them: --config.mesh=FSDP_TP --config.tensor=N"
    memory = plan.memory
    if memory.trained + memory.optimizer + memory.frozen > memory.capacity:
        if plan.mesh == "DP":
            return "cut the weights over the devices: --config.mesh=FSDP"
        return "more chips, or chips with more memory: what the step is given does not fit, whatever it computes"
    if plan.remat == "none":
        return "recompute activations: --config.remat=dots, attention or full, each with less memory than the last"
    if plan.mesh == "DP":
        return "cut the weights over the devices: --config.mesh=FSDP"
    if plan.remat != "full":
        return "recompute all of each layer: --config.remat=full"
    if plan.rows > plan.devices:
        return "fewer rows at a time: --rows-per-shard=1 and a larger stages.X.accumulate"
    return "more chips, chips with more memory, or --config.mesh=FSDP_TP, which cuts activations too"


def as_dict(plan: Plan) -> dict[str, Any]:
    """The figures for a file."""
    out = {
        "recipe": plan.recipe,
        "stage": plan.stage,
        "topology": str(plan.topology),
        "mesh": plan.mesh,
        "remat": plan.remat,
        "compiled": plan.compiled,
        "rows": plan.rows,
        "tokens": plan.tokens,
        "memory_bytes": dataclasses.asdict(plan.memory),
        "model_flops": plan.model_flops,
        "versions": dict(plan.versions),
    }
    if plan.work is not None:
        kinds = sorted({one.kind for one in plan.work.collectives})
        out |= {
            "flops_of_a_device": None if plan.memory.cache else plan.flops,
            "collective_bytes": {kind: plan.work.bytes_of(kind) for kind in kinds},
            "between_slices_bytes": {one.kind: one.bytes for one in plan.work.between},
            "estimate_seconds": dataclasses.asdict(roofline(plan)),
        }
    return out
