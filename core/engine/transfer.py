"""Between the host's arrays and the device, without waiting where that is possible.

Decisions: on a CPU both are the same memory and nothing is copied. To a GPU a copy goes through pinned memory, which
torch keeps for the next one once the copy is done, so that it runs behind the host's back. From a GPU copies are asked
for when their numbers are still to be computed; who reads them waits for that point, not for what was asked after it.
"""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of `array`; on the CPU they share memory."""
    return send(torch.from_numpy(array), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device."""
    if device.type != "cuda" or not tensor.numel() or not tensor.is_cpu:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Arrival:
    """Arrays of `tensors`, all of one device, which are on their way to the host."""

    def __init__(self, *tensors: Tensor):
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned, from a GPU
        self._event = torch.cuda.Event() if tensors[0].is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def arrays(self) -> list[np.ndarray]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]
