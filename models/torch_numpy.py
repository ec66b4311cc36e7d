"""Between torch and NumPy, bfloat16 included (which torch does not convert itself)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_torch(values: npt.NDArray[Any]) -> torch.Tensor:
    """A copy of `values` as a tensor of the same type."""
    if values.dtype == _BFLOAT16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The tensor's values as an array of the same type; shares memory where they are contiguous."""
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return np.asarray(values.view(torch.int16).numpy()).view(_BFLOAT16)
    return np.asarray(values.numpy())
