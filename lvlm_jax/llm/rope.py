"""Rotary settings of public config.json files: the old top-level fields and the nested ones of newer files."""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import one_of
from lvlm_jax.nn.positions import RopeScaling

DEFAULT_THETA = 10000.0
"""What the public classes assume where a config gives none."""


def rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (nested), or from ``rope_theta`` and ``rope_scaling`` (top level).

    Raises:
      ValueError: a rope_type or partial rotation that we do not have, or a scaling without its factor.
    """
    nested = config.get("rope_parameters") or {}
    name = "rope_parameters" if nested else "rope_scaling"
    found = {**(config.get("rope_scaling") or {}), **nested}
    theta = float(found.get("rope_theta", config.get("rope_theta", DEFAULT_THETA)))
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    one_of("partial_rotary_factor", float(partial), [1.0])
    kind = found.get("rope_type", found.get("type", "default"))
    one_of(f"{name}.rope_type", kind, ["default", "linear", "llama3"])
    if kind == "default":
        return theta, None
    names = {"linear": ["factor"], "llama3": list(_LLAMA3)}[kind]
    if missing := [field for field in names if found.get(field) is None]:
        raise ValueError(f"config.json: {name} of type {kind!r} lacks {', '.join(missing)}")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(found["factor"]))
    return theta, RopeScaling(kind="llama3", **{ours: make(found[field]) for field, (ours, make) in _LLAMA3.items()})


_LLAMA3 = {
    "factor": ("factor", float),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_max_position_embeddings": ("original_context", int),
}


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Both forms, so that older and newer software read the same: they hold the same values."""
    if scaling is None:
        found: dict[str, Any] = {"rope_type": "default"}
    elif scaling.kind == "linear":
        found = {"rope_type": "linear", "factor": scaling.factor}
    else:
        found = {"rope_type": "llama3"} | {field: getattr(scaling, ours) for field, (ours, _) in _LLAMA3.items()}
    old = {"rope_theta": theta, "rope_scaling": None if scaling is None else dict(found)}
    return {**old, "rope_parameters": {**found, "rope_theta": theta}}
