"""The Triton kernels: on a GPU with MODELPORT_TEST_DEVICE=cuda, else through Triton's interpreter on the CPU.

Memory that nobody wrote holds NaN in these tests, so that an output with a hole in it shows.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from modelport.kernels import gpu

DEVICE = os.environ.get("MODELPORT_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no test file does


@pytest.fixture(scope="session", autouse=True)
def _scalars_of_the_interpreter() -> None:
    """Triton 3.6 holds a scalar as an array of one element, of which numpy 2.4 makes no int where a loop needs one."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patched


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(gpu, "interpreted", DEVICE == "cpu")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(DEVICE):
        yield DEVICE
    torch.use_deterministic_algorithms(False)
