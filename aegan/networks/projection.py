"""An image discriminator that is told the class of each image."""

import math

from torch import Tensor, nn


class Projection(nn.Module):
    """logit = (v + v_class) . h + b, on the features h before the last layer.

    Equation (3) of Miyato and Koyama 2018.
    """

    def __init__(self, network: nn.Sequential, *, num_classes: int) -> None:
        super().__init__()
        *features, to_logit = network
        assert isinstance(to_logit, nn.Linear)
        self.features = nn.Sequential(*features)
        self.to_logit = to_logit
        self.of_class = nn.Linear(num_classes, to_logit.in_features, bias=False)
        bound = 1 / math.sqrt(
            to_logit.in_features
        )  # PyTorch's for the last layer, as it adds to it
        nn.init.uniform_(self.of_class.weight, -bound, bound)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x [k N, C, H, W], k kinds of the same N classes, one-hot [N, classes] => [k N, 1]."""
        h = self.features(x)
        of_class = self.of_class(labels).repeat(len(h) // len(labels), 1)
        logit: Tensor = self.to_logit(h) + (of_class * h).sum(1, keepdim=True)
        return logit
