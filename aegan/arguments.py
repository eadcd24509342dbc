"""Arguments of public functions: what does not fit is one sentence that says what was expected."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def whole_number(name: str, value: Any, *, lowest: int, highest: float = math.inf) -> int:
    """`value` as an int; raises ValueError unless it is a whole number within the limits."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not lowest <= number <= highest:
        limits = f"{lowest} or more" if highest == math.inf else f"{lowest} to {highest}"
        raise ValueError(f"{name} is {value}; expected a whole number, {limits}")
    return number


def as_tensor(name: str, values: Any) -> Tensor:
    import torch  # here: a process that only draws pictures does not load it

    if isinstance(values, torch.Tensor):
        return values
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{name} is a {type(values).__name__}; expected a tensor or an array")
    try:
        # A copy: arrays may be read-only, mirrored or in another byte order.
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {values.dtype}; expected an array of numbers") from None


def described(tensor: Tensor) -> str:
    return f"{type_name(tensor.dtype)} {list(tensor.shape)}"


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
