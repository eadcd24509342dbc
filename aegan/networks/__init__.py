"""Generator, encoder and discriminators, and the layers they are made of."""

from aegan.networks.model import AEGAN, ARCHITECTURES

__all__ = ["AEGAN", "ARCHITECTURES"]
