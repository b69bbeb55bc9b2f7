"""The torch library's side of `verify` for models whose text looks at pictures from between the layers (Idefics)."""

from typing import Any


def reference(model: Any, tokens: Any, pixels: Any, picture: int) -> dict[str, Any]:
    """Its stages on one row with one picture.

    Args:
      tokens: ids [1, T] with `picture` where the picture stands; pixels: [1, 3, height, width].
    """
    import torch

    features = model.model.vision_model(pixels).last_hidden_state
    seen = (tokens == picture).cumsum(1)[..., None]  # of the one picture there is: from where it stands on
    out = model(
        input_ids=tokens,
        pixel_values=pixels[None],
        image_attention_mask=seen,
        attention_mask=torch.ones_like(tokens),
        output_hidden_states=True,
    )
    return {
        "vision features": features,
        "connector": model.model.perceiver_resampler(features),
        "hidden states": out.hidden_states[-1],
        "logits": out.logits,
    }
