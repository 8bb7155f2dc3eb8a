"""Between the host's arrays and the device, without waiting where that is possible.

Decisions: on a CPU both are the same memory and nothing is copied. To a GPU a copy goes through pinned memory, which
torch keeps for the next one once the copy is done, so that it runs behind the host's back; from a GPU all that a step
wants comes with one wait.
"""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of `array`; on the CPU they share memory."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Arrays of `tensors`, all of one device, once it has computed them."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned, from a GPU
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]
