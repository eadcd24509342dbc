"""Latents nearer to an image than E(x): found by following the gradient of the image's error."""

import torch
from torch import Tensor

from aegan.arguments import as_tensor, whole_number
from aegan.networks import AEGAN
from aegan.pixels import to_float
from aegan.priors import Array
from aegan.sampling import encode

BATCH_SIZE = 32
LEARNING_RATE = 0.05


def project(model: AEGAN, images: Array, *, steps: int = 200) -> Tensor:
    """Latents [N, latent_dim] whose G(z) is as near to uint8 [N, H, W, C] as `steps` steps find.

    Adam moves E's output, which the prior turns into latents as it does those of E(x): they stay
    on its sphere, within its range, or bits and categories. The error is |x - G(z)| in the mean,
    and the best latent met is kept: none is worse than E(x). Raises ValueError.
    """
    steps = whole_number("steps", steps, lowest=0)
    encode(model, images)  # raises for images that do not fit, and without an encoder
    images = as_tensor("images", images)
    batches = images.flatten(0, -4).split(BATCH_SIZE)
    refined = torch.cat([_refine(model, batch, steps) for batch in batches])
    return refined.view(*images.shape[:-3], model.latent_dim)


def _refine(model: AEGAN, images: Tensor, steps: int) -> Tensor:
    """Of one batch of uint8 [N, H, W, C]."""
    assert model.encoder is not None
    x = to_float(images.to(next(model.generator.parameters()).device))
    with torch.no_grad():
        output = model.encoder(x).float()
    output.requires_grad_()
    optimizer = torch.optim.Adam([output], lr=LEARNING_RATE)
    best = model.prior.given(output).detach().clone()  # Adam writes into `output`
    least = torch.full((len(x),), torch.inf, device=x.device)
    for _ in range(steps + 1):  # the first one measures E(x) itself
        z = model.prior.given(output)
        errors = (model.generator(z) - x).abs().mean(dim=(1, 2, 3))
        better = errors.detach() < least
        best[better], least[better] = z.detach()[better], errors.detach()[better]
        (output.grad,) = torch.autograd.grad(errors.sum(), output)
        optimizer.step()
    return best.cpu()
