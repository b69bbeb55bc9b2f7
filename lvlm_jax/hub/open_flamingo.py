"""OpenFlamingo's checkpoints: what its authors trained, laid over a tower and a language model of other people.

Such a delta holds the resampler, the gated blocks, and the table of words, which grew by ``<|endofchunk|>`` and
``<image>``. Its shapes tell the sizes of all three. Source: the authors' repository, version 2.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lvlm_jax import keymap, llm
from lvlm_jax import params as P
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.hub.convert import Loaded, import_folder
from lvlm_jax.hub.families import KINDS
from lvlm_jax.hub.safetensors_io import TensorFolder
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.shapes import DTypeLike, Params
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo import open_flamingo

HEAD = 64
"""Width of a head in resampler and blocks, which no shape tells."""

_WRAPPED = re.compile(r"lang_encoder\.(?:.*\.)?(\d+)\.gated_cross_attn_layer\.")
"""A gated block under the decoder layer that it stands before, as the authors' training loop writes it."""


def import_delta(
    delta: str | Path, host: str | Path, tower: str | Path, image_token_id: int, dtype: DTypeLike | None = None
) -> Loaded:
    """Reads a delta and what it stands on.

    Args:
      delta: folder of the delta as safetensors (the authors' ``checkpoint.pt`` is a pickle: convert it).
      host, tower: folder or hub name of the language model and of the vision tower.
      image_token_id: id of ``<image>``; the authors add it to the host's tokenizer behind ``<|endofchunk|>``.
      dtype: of the arrays; default what each file holds.

    Raises:
      CheckpointError: what does not fit.
    """
    given = normalised(TensorFolder(Path(delta)))
    words, picture = import_folder(host, kind="decoder", dtype=dtype), import_folder(tower, kind="vision", dtype=dtype)
    try:
        config = config_of({key: tensor.shape for key, tensor in given.items()}, words.config, picture.config)
        params = complete(config, given, picture.params, words.params)
    except ValueError as error:
        raise CheckpointError(f"{delta}: {error}") from error
    params = params if dtype is None else P.cast(params, dtype)
    axes = KINDS["lvlm"].shapes(config, False)[1]
    layout = next(iter(open_flamingo.LAYOUTS))
    return Loaded(
        kind="lvlm",
        config=config,
        params=params,
        axes=axes,
        image_token_id=image_token_id,
        layout=layout,
        folder=Path(delta),
    )


def normalised(delta: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' state with plain keys: out of ``model_state_dict``, less ``module.``, the blocks in their list."""
    out = {}
    for key, tensor in delta.get("model_state_dict", delta).items():
        key = key.removeprefix("module.").replace("._checkpoint_wrapped_module", "").replace(".decoder_layer.", ".")
        out[_WRAPPED.sub(r"lang_encoder.gated_cross_attn_layers.\1.", key)] = tensor
    return out


def config_of(shapes: Mapping[str, tuple[int, ...]], host: DecoderConfig, tower: ViTConfig) -> LVLMConfig:
    """The whole model, by the shapes of a normalised delta.

    Raises:
      ValueError: no resampler or no gated block among them, or heads of another width than `HEAD`.
    """
    numbers = sorted(
        {int(found[1]) for key in shapes if (found := re.search(r"gated_cross_attn_layers\.(\d+)\.", key))}
    )
    layers = {found[1] for key in shapes if (found := re.match(r"perceiver\.layers\.(\d+)\.", key))}
    if not numbers or not layers:
        raise ValueError("no perceiver.* or no gated_cross_attn_layers.* among its keys; is it OpenFlamingo's delta?")

    def heads(key: str) -> int:
        count, rest = divmod(shapes[key][0], HEAD)
        if rest:
            raise ValueError(f"{key} is {shapes[key][0]} wide, which is no number of heads of {HEAD}")
        return count

    first = f"lang_encoder.gated_cross_attn_layers.{numbers[0]}"
    resampler = {"latents": shapes["perceiver.latents"][0], "depth": len(layers)}
    resampler["heads"] = heads("perceiver.layers.0.0.to_q.weight")
    config = LVLMConfig(
        vision=dataclasses.replace(tower, feature_layer=-1, class_feature=False),
        connector=dataclasses.replace(open_flamingo.RESAMPLER, **resampler),
        llm=host,
        fusion=CrossAttentionConfig(every=numbers[0] + 1, heads=heads(f"{first}.attn.to_q.weight")),
    )
    table = next(row.theirs for row in open_flamingo.host_rows(config) if row.leaves[-1].endswith("embed/table"))
    vocab = shapes[table][0] if table in shapes else host.vocab
    return dataclasses.replace(config, llm=dataclasses.replace(host, vocab=vocab))


def complete(config: LVLMConfig, delta: Mapping[str, Any], tower: Params, host: Params) -> Params:
    """The parameters of a whole model: a delta over a tower and a language model that were loaded for themselves.

    Args:
      config: the whole model; its `llm.vocab` is that of the delta's table, which grew.
      delta: the authors' state, numpy arrays by key.
      tower, host: trees of the two alone; what the delta has of the language model goes before `host`, and a head of
        its own that lacks the new words gets their mean, or is cut where it has rows that no word reaches.

    Raises:
      ValueError: a key of the delta that nothing holds, one that is missing, or a tensor of another shape.
    """
    own = {row.theirs: row for row in open_flamingo.host_rows(config)}
    unused = re.compile("|".join(llm.FAMILIES[llm.family_of(config.llm)].UNUSED) or "(?!)")
    given = {key: tensor for key, tensor in normalised(delta).items() if not unused.fullmatch(key)}
    table = [*open_flamingo.trained_rows(config), *(own[key] for key in given if key in own)]
    keymap.check(table, [path for row in table for path in row.leaves], given, "the delta")
    kept = {f"llm/{path}": leaf for path, leaf in P.flatten(host).items()}
    kept |= {f"vision/{path}": leaf for path, leaf in P.flatten(tower).items()}
    flat = {path: leaf for row in table for path, leaf in row.load(np.asarray(given[row.theirs])).items()}
    whole = {**kept, **flat}
    if "llm/head/kernel" in whole:
        head = jnp.asarray(whole["llm/head/kernel"])[:, : config.llm.vocab]
        more = config.llm.vocab - head.shape[1]
        whole["llm/head/kernel"] = P.add_rows(head, more, axis=1) if more else head
    shapes = {path: leaf.shape for path, leaf in P.flatten(KINDS["lvlm"].shapes(config, False)[0]).items()}
    if gaps := sorted(whole.keys() ^ shapes.keys()):
        raise ValueError(
            f"tower, language model and delta together are not this config's model; they differ at {gaps[:5]}"
        )
    wrong = [
        f"{path} {list(whole[path].shape)} for {list(shapes[path])}"
        for path in shapes
        if whole[path].shape != shapes[path]
    ]
    if wrong:
        raise ValueError(f"tensors of another shape than the config's: {', '.join(wrong[:5])}")
    return P.unflatten(whole)
