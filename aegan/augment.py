"""What D_x sees of an image: random changes of its colours, its place and its completeness.

D_x learns a small data set by heart. Real images and fakes are therefore changed alike before it
sees them, and gradients reach the generator through the change: Zhao et al. 2020 (DiffAugment),
whose kinds and ranges these are. Each kind comes to each image with a probability, which is fixed
or follows how much D_x has learnt by heart: Karras et al. 2020 (ADA).
"""

import torch
from torch import Tensor, nn

# Uniform numbers that a training step needs for each image of a batch: for two updates, that of the
# discriminators and that of encoder and generator, and in each for x, x_hat and x_tilde.
DRAWS = (2, 3, 10)
ADJUST_INTERVAL_STEPS = 4  # as in ADA; a round of the author's update rule is as long


def augment(images: Tensor, draws: Tensor, probability: Tensor | float) -> Tensor:
    """Images [N, C, S, S] around [-1, 1], with each kind of change by this probability.

    `draws` [N, 10], uniform in [0, 1), say which changes and how much. What is moved in or cut out
    is 0, a medium gray; an image that no change comes to stays as it is, to the last bit.
    """
    side = images.shape[-1]
    recolour, move, cut = (draws[:, :3] < probability).split(1, dim=1)
    brightness, saturation, contrast = draws[:, 3:6].split(1, dim=1)
    images = change_colours(
        images,
        brightness=torch.where(recolour, brightness - 0.5, 0.0),
        saturation=torch.where(recolour, 2 * saturation, 1.0),
        contrast=torch.where(recolour, 0.5 + contrast, 1.0),
    )
    furthest = side // 8
    shift = whole(draws[:, 6:8], 2 * furthest + 1) - furthest
    images = translate(images, torch.where(move, shift, 0))
    corner = whole(draws[:, 8:10], side + 1) - side // 4  # of a square around any point
    return cut_out(images, torch.where(cut, corner, side), side // 2)


def change_colours(
    images: Tensor, *, brightness: Tensor, saturation: Tensor, contrast: Tensor
) -> Tensor:
    """Stretch colours around each pixel's gray, then all around the image's mean, and brighten.

    The amounts are [N, 1]; saturation and contrast of 1 and brightness of 0 change nothing.
    """
    brightness, saturation, contrast = (
        amount[:, :, None, None].to(images.dtype) for amount in (brightness, saturation, contrast)
    )
    gray = images.mean(1, keepdim=True)
    mean = gray.mean((2, 3), keepdim=True)  # which saturation leaves as it is
    around = contrast * (1 - saturation) * gray + ((1 - contrast) * mean + brightness)
    return images * (contrast * saturation) + around


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Each image moved by so many pixels, down and to the right: whole numbers [N, 2]."""
    channels, side = images.shape[1:3]
    source = torch.arange(side, device=images.device) - shift[:, :, None]  # [N, 2, S]
    rows, columns = source.clamp(0, side - 1).unbind(1)
    places = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)  # [N, S * S]
    pixels = images.movedim(1, -1).flatten(1, 2)  # a view where channels are last in memory
    moved: Tensor = pixels.gather(1, places[:, :, None].expand(-1, -1, channels))
    moved = moved.unflatten(1, (side, side)).movedim(-1, 1)
    return moved * _square((source >= 0) & (source < side))  # `masked_fill` changes the layout


def cut_out(images: Tensor, corner: Tensor, size: int) -> Tensor:
    """Each image without a square: its upper left corner [N, 2], anywhere, and its side."""
    place = torch.arange(images.shape[-1], device=images.device) - corner[:, :, None]  # [N, 2, S]
    return images * ~_square((place >= 0) & (place < size))


def whole(draws: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) as equally likely ones among 0 ... count - 1."""
    return (draws * count).long()


def _square(chosen: Tensor) -> Tensor:
    """Pixels in the chosen rows and columns: [N, 2, S] => [N, 1, S, S]."""
    rows, columns = chosen.unbind(1)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def overfitting(image_logits: Tensor, num_real: int, *, relativistic: bool) -> Tensor:
    """ADA's r_t of one batch: 0 if D_x is at a loss, 1 if it is sure of every real image.

    The mean sign of its logits on real images. A relativistic D_x is trained on differences alone,
    its logits themselves mean nothing: there, the sign of each real one's distance to its fakes.
    """
    real, *fakes = image_logits.detach().split(num_real)
    margins = [real - fake for fake in fakes] if relativistic else [real]
    return torch.cat(margins).sign().mean()


class Augmentation(nn.Module):
    """The probability of each kind of change, and ADA's rule that moves it.

    `target`: where r_t should be; 0 leaves the probability to its schedule, if it has one.
    `images`: shown while it goes from 0 to 1. The state of ADA's rule is part of every checkpoint.
    """

    probability: Tensor
    overfitting_sum: Tensor  # of r_t, since the last adjustment
    overfitting_count: Tensor

    def __init__(
        self, probability: float, *, target: float, images: int, is_scheduled: bool = False
    ) -> None:
        super().__init__()
        self.target, self.images = target, images
        self.is_adaptive, self.is_scheduled = target > 0, is_scheduled
        self.is_on = probability > 0 or self.is_adaptive or is_scheduled
        for name, value in (
            ("probability", probability),
            ("overfitting_sum", 0.0),
            ("overfitting_count", 0.0),
        ):
            self.register_buffer(name, torch.tensor(value), persistent=self.is_adaptive)

    def forward(self, images: Tensor, looks: Tensor) -> Tensor:
        """Images [K * N, C, S, S], of K kinds one after the other; their draws [N, 3, 10]."""
        kinds = len(images) // len(looks)
        return augment(images, looks[:, :kinds].transpose(0, 1).flatten(0, 1), self.probability)

    def observe(self, overfitting: Tensor) -> None:
        """Note r_t of one batch, the same on all ranks."""
        self.overfitting_sum += overfitting
        self.overfitting_count += 1

    def adjust(self, images_shown: int) -> None:
        """A step up if r_t, since the last call, is above its target, else a step down."""
        excess = self.overfitting_sum / self.overfitting_count - self.target
        self.probability += excess.sign() * images_shown / self.images
        self.probability.clamp_(0, 1)
        self.overfitting_sum.zero_()
        self.overfitting_count.zero_()
