import pytest
import torch

from lvlm_jax.processing.frames import by_rate


@pytest.mark.slow
def test_frames_by_rate_are_spaced_as_torch_spaces_them():
    """qwen-vl-utils takes ``torch.linspace(0, N - 1, n).round()``, whose float32 decides where a half goes."""
    for total in range(2, 400, 3):
        for count in range(1, min(total, 64) + 1, 3):
            wanted = torch.linspace(0, total - 1, count).round().long().tolist()
            assert by_rate(total, 25.0, 1e-3, count, count) == wanted, (total, count)
