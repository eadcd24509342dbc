"""Between pictures and networks: uint8 [N, H, W, C] <-> float [N, C, H, W] in [-1, 1]."""

from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] => float32 [N, C, H, W] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().mul_(1 / 127.5).sub_(1)


def to_intensities(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] => float32 [N, C, H, W] from 0 to 255, as structural similarity has it."""
    return images.permute(0, 3, 1, 2).float()


def to_uint8(x: Tensor) -> Tensor:
    """Float [N, C, H, W] in [-1, 1] => uint8 [N, H, W, C], rounded."""
    pixels = x.float().add(1).mul_(127.5).round_().clamp_(0, 255)
    return pixels.byte().permute(0, 2, 3, 1).contiguous()
