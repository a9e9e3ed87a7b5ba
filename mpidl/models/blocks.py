"""What several models are built of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class Convolution(nn.Module):
    """A convolution without bias, normalised, and rectified: GoogLeNet's and Inception-v3's unit.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: the kernel's side, or (height, width).
        batch_norm: whether to normalise; without, the convolution has a bias.
        **options: stride and padding, as torch's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        batch_norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=not batch_norm, **options)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3) if batch_norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, ...)."""
        return functional.relu(self.bn(self.conv(features)), inplace=True)
