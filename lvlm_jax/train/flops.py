"""Model FLOPs of a training step, defined once: what MFU divides by the chips' peak.

A matrix product costs 2 FLOPs a weight and token forward. A trained part costs 6 (forward, and gradients of inputs and
weights), a frozen part that the gradient passes through 4, a frozen part before every trained one 2. Attention adds its
two products over the keys that a query may see, once, twice or three times its forward cost.
Recomputation (remat) does not count.
"""

from collections.abc import Mapping

from lvlm_jax import params as trees
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.shapes import Params

ORDER = ("vision", "connector", "llm")
"""The way of the gradient, backwards."""


def factors(trained: Mapping[str, bool]) -> dict[str, int]:
    """FLOPs a weight and token of each part, 6, 4 or 2; `trained` says which parts have a trained leaf."""
    out, upstream = {}, False
    for part in ORDER:
        out[part] = 6 if trained[part] else 4 if upstream else 2
        upstream = upstream or trained[part]
    return out


def step_flops(
    config: LVLMConfig, shapes: Params, trained: Mapping[str, bool], *, rows: int, length: int, pictures: int
) -> float:
    """Model FLOPs of one step of `rows` text rows of `length` positions and `pictures` pictures, all full.

    Args:
      shapes: parameter shapes of the whole model (any layout).
      trained: part -> whether any of its leaves is trained.
    """
    factor = factors(trained)
    flat = trees.flatten(shapes)
    # A table is looked up, not multiplied; a tied one is multiplied once, as the head.
    products = {path: leaf for path, leaf in flat.items() if path.endswith("kernel")}
    if config.llm.tied:
        products["llm/embed/table"] = flat["llm/embed/table"]
    vision, llm = config.vision, config.llm
    tokens = {"vision": pictures * vision.patches, "connector": pictures * config.visual_tokens, "llm": rows * length}
    total = 0.0
    for part in ORDER:
        weights = trees.size([leaf for path, leaf in products.items() if path.startswith(f"{part}/")])
        total += factor[part] * tokens[part] * weights
    total += factor["vision"] / 2 * vision.depth * 4 * tokens["vision"] * vision.patches * vision.width
    seen = sum(_seen(length, llm.window if kind == "local" else None, config.attention) for kind in llm.layer_kinds)
    total += factor["llm"] / 2 * 4 * tokens["llm"] * seen * llm.heads * llm.head_width
    return total


def _seen(length: int, window: int | None, attention: str) -> float:
    """Keys that a position of a full row sees, on average."""
    if window is None or window >= length:
        return length / 2 if attention == "causal" else length
    return window * (1 - window / (2 * length))  # the first positions of a row have fewer before them
