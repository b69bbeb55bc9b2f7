"""Which layers slide a window: ``layer_types`` of public config.json files, and our repeated pattern."""

from collections.abc import Sequence

from lvlm_jax.keymap import one_of
from lvlm_jax.llm.decoder import DecoderConfig

TYPES = {"full_attention": "global", "sliding_attention": "local"}
"""Public name of a kind of layer -> ours."""


def every(number: int, depth: int) -> list[str]:
    """The public list in which each `number`-th layer is global and the others slide."""
    return ["full_attention" if (i + 1) % number == 0 else "sliding_attention" for i in range(depth)]


def pattern_from_hf(types: Sequence[str], depth: int) -> tuple[str, ...]:
    """The shortest pattern that gives this list when repeated.

    Raises:
      ValueError: an unknown kind of layer, or a list of another length than there are layers.
    """
    kinds = [TYPES[one_of("layer_types", kind, TYPES)] for kind in types]
    if len(kinds) != depth:
        raise ValueError(f"config.json: layer_types names {len(kinds)} layers, but num_hidden_layers is {depth}")
    lengths = range(1, depth + 1)
    period = next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[:period])


def types_to_hf(config: DecoderConfig) -> list[str]:
    """The inverse of `pattern_from_hf`."""
    public = {ours: theirs for theirs, ours in TYPES.items()}
    return [public[kind] for kind in config.layer_kinds]
