"""Rotary settings of public config.json files: the old top-level fields and the nested ones of newer files."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvlm_jax.keymap import one_of
from lvlm_jax.nn.positions import RopeScaling, yarn_magnitude

DEFAULT_THETA = 10000.0
"""What the public classes assume where a config gives none."""


def rope_from_hf(config: Mapping[str, Any], partial: bool = False) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (nested), or from ``rope_theta`` and ``rope_scaling`` (top level).

    Args:
      partial: whether the family may rotate a part of a head, which `fraction_from_hf` reads.

    Raises:
      ValueError: a rope_type or partial rotation that we do not have, or a scaling without its factor.
    """
    nested = config.get("rope_parameters") or {}
    name = "rope_parameters" if nested else "rope_scaling"
    found = {**(config.get("rope_scaling") or {}), **nested}
    theta = float(found.get("rope_theta", config.get("rope_theta", DEFAULT_THETA)))
    if not partial:
        one_of("partial_rotary_factor", fraction_from_hf(config), [1.0])
    one_of("mrope_section", found.get("mrope_section"), [None])  # a family that has axes reads them (`mrope_from_hf`)
    kind = found.get("rope_type", found.get("type", "default"))
    one_of(f"{name}.rope_type", kind, ["default", *_NEEDED])
    if kind == "default":
        return theta, None
    if missing := [field for field in _NEEDED[kind] if found.get(field) is None]:
        raise ValueError(f"config.json: {name} of type {kind!r} lacks {', '.join(missing)}")
    if kind == "yarn" and found.get("attention_factor") is None and found.get("mscale") and found.get("mscale_all_dim"):
        parts = [yarn_magnitude(float(found["factor"]), found[field]) for field in ("mscale", "mscale_all_dim")]
        found["attention_factor"] = parts[0] / parts[1]
    given = {_OURS[field]: found[field] for field in _fields(kind) if found.get(field) is not None}
    makers = {"original_context": int, "truncate": bool}
    return theta, RopeScaling(kind=kind, **{field: makers.get(field, float)(value) for field, value in given.items()})


def mrope_from_hf(
    config: Mapping[str, Any], default: Sequence[int], interleaved: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the config without its axes, the `DecoderConfig` fields that they are), for families that turn by several.

    Args:
      default: ``mrope_section`` where the config names none.
      interleaved: how the family takes the axes; a config may say it, too, but not say the other.

    Raises:
      ValueError: axes taken in the other order.
    """
    plain, sections = dict(config), list(default)
    for name in ("rope_scaling", "rope_parameters"):
        found = dict(config.get(name) or {})
        sections = found.pop("mrope_section", None) or sections
        one_of(f"{name}.mrope_interleaved", found.pop("mrope_interleaved", interleaved), [interleaved])
        # The first releases named it as a kind of its own.
        found |= {key: "default" for key in ("type", "rope_type") if found.get(key) == "mrope"}
        plain[name] = found or None
    return plain, {"mrope": tuple(sections), "mrope_interleaved": interleaved}


def mrope_to_hf(public: Mapping[str, Any], sections: Sequence[int], interleaved: bool) -> dict[str, Any]:
    """A public config as `rope_to_hf` wrote it, with axes in both forms."""
    axes = {"mrope_section": list(sections)} | ({"mrope_interleaved": True} if interleaved else {})
    old = public["rope_scaling"] or {"rope_type": "default"}
    # Versions 4 of the torch library read the old form, and its kind under the older name.
    old = {**old, "type": old["rope_type"]} | axes
    return {**public, "rope_scaling": old, "rope_parameters": {**public["rope_parameters"], **axes}}


def fraction_from_hf(config: Mapping[str, Any], default: float = 1.0) -> float:
    """How much of a head is rotated: ``partial_rotary_factor``, nested or at the top level."""
    found = {"partial_rotary_factor": default, **config, **(config.get("rope_parameters") or {})}
    return float(found["partial_rotary_factor"])


_CONTEXT = "original_max_position_embeddings"
_NEEDED = {
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", _CONTEXT],
    "yarn": ["factor", _CONTEXT],
}
"""Fields that each kind of scaling must give."""

_MORE = {"yarn": ["beta_fast", "beta_slow", "truncate", "attention_factor"]}
"""Fields that it may give."""

_OURS = {name: name for names in (*_NEEDED.values(), *_MORE.values()) for name in names} | {
    _CONTEXT: "original_context"
}


def _fields(kind: str) -> list[str]:
    return [*_NEEDED[kind], *_MORE.get(kind, ())]


def rope_to_hf(theta: float, scaling: RopeScaling | None, fraction: float | None = None) -> dict[str, Any]:
    """Both forms, so that older and newer software read the same: they hold the same values.

    Args:
      fraction: how much of a head is rotated, for the families that may rotate a part.
    """
    if scaling is None:
        found: dict[str, Any] = {"rope_type": "default"}
    else:
        values = {field: getattr(scaling, _OURS[field]) for field in _fields(scaling.kind)}
        found = {"rope_type": scaling.kind} | {field: value for field, value in values.items() if value is not None}
    old = {"rope_theta": theta, "rope_scaling": None if scaling is None else dict(found)}
    new = {**found, "rope_theta": theta}
    if fraction is None:
        return {**old, "rope_parameters": new}
    part = {"partial_rotary_factor": fraction}
    return {**old, **part, "rope_parameters": new | part}
