"""The greatest element of each row, which is all that greedy decoding asks of the logits.

One pass, which also tells whether the row holds a NaN; for bfloat16 rows torch takes over ten times as long on a CPU.
"""

import torch
from torch import Tensor

from modelport.kernels import cpu


def argmax_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch version of `argmax`."""
    places = x.argmax(-1)
    return places, x.gather(1, places[:, None])[:, 0].float()


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the greatest element of each row is, the first of equals, and its value.

    x: (rows, width) of any floating type -> (rows,) int64, (rows,) float32. A row with a NaN has the value NaN and some
    place inside the row.
    """
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"argmax: x {tuple(x.shape)} must be (rows, width), width at least 1")
    if cpu.lib is not None and x.is_cpu:
        places, values = torch.empty(x.shape[0], dtype=torch.int64), torch.empty(x.shape[0])
        if cpu.lib.best(x, places, values, cpu.threads()):
            return places, values
    return argmax_reference(x)
