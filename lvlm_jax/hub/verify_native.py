"""Both sides of `verify` for models that read pictures at their own resolution (Qwen-VL)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image

from lvlm_jax.processing import native
from lvlm_jax.processing.image import ImageSpec, to_rows
from lvlm_jax.processing.schema import TEXT, Encoded, Image
from lvlm_jax.processing.shared_rows import Shared


def spec_of(tower: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageSpec:
    """How pictures come to a tower whose folder does not say."""
    own = native.Native(merge=tower.merge, frames=tower.patch_frames, window=tower.window)
    return ImageSpec(
        size=tower.image_size,
        patch=tower.patch_size,
        mean=mean,
        std=std,
        fit="native",
        max_patches=tower.max_patches,
        native=own,
    )


def inputs(image: PIL.Image.Image, spec: ImageSpec, words: list[int], image_token_id: int) -> dict[str, np.ndarray]:
    """Token ids with a picture behind the first two, and the picture in a vision row that it fills.

    ``grid`` and ``pixels`` are as the torch library takes them: token by token, whatever the windows, each patch's
    values channel by channel. ``taken`` says where each token of the picture stands in what our tower gives.
    """
    shared = Shared(spec)
    found = shared.add(Image(image))
    tokens = [*words[:2], *[image_token_id] * len(found.index), *words[2:]]
    visual = np.full(len(tokens), TEXT, np.int32)
    visual[2 : 2 + len(found.index)] = found.index
    weights = np.zeros(len(tokens), np.float32)
    encoded = Encoded(np.asarray(tokens, np.int32), weights, visual, (Image(image),), (1,), (len(found.index),))
    patches, positions = to_rows(image, spec)
    own = spec.native
    _, rows, cols = shared.grids[0]
    plain = np.argsort(native.order(rows, cols, own.merge, own.window))[native.order(rows, cols, own.merge)]
    values = patches[0, plain].reshape(-1, own.frames, spec.patch, spec.patch, 3).transpose(0, 4, 1, 2, 3)
    return {
        "tokens": encoded.tokens[None],
        "weights": encoded.weights[None],
        "image_index": visual[None],
        "axes": shared.finished(encoded).axes[None],
        "patches": patches,
        "positions": np.ascontiguousarray(positions),
        "segments": np.ones(patches.shape[:2], np.int32),
        "taken": found.index,
        "grid": np.asarray([[1, rows, cols]], np.int32),
        "pixels": values.reshape(len(values), -1),
    }


def ordered(parts: dict[str, Any], taken: Any, width: int) -> dict[str, Any]:
    """Our stages as theirs are: the last layer's features alone, the picture's tokens in reading order.

    Args:
      taken: of `inputs`. width: of the tower.
    """
    tokens = jnp.take(parts["connector"], taken, axis=1)
    return parts | {"vision features": parts["vision features"][..., :width], "connector": tokens}


def reference(model: Any, tokens: Any, pixels: Any, grid: Any) -> dict[str, Any]:
    """The torch library's stages on one row with one picture; their types are `inputs`'."""
    import torch

    seen = model.model.visual(pixels, grid_thw=grid)
    out = model(
        input_ids=tokens,
        pixel_values=pixels,
        image_grid_thw=grid,
        mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        attention_mask=torch.ones_like(tokens),
        output_hidden_states=True,
    )
    merged = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())]
    return {
        "vision features": seen.last_hidden_state[None],
        "connector": torch.cat(merged, dim=-1)[None],
        "hidden states": out.hidden_states[-1],
        "logits": out.logits,
    }
