"""The kernels' threads: several callers at once, a forked process, and processors that somebody else uses."""

import os
import threading
import time

import pytest
import torch

from modelport.kernels import cpu
from modelport.kernels.linear import linear, linear_reference, pack

pytestmark = pytest.mark.skipif(cpu.lib is None, reason="the compiled kernels are not built")


@pytest.fixture
def product():
    torch.manual_seed(0)
    packed, x = pack(torch.randn(512, 256)), torch.randn(40, 256)
    want = linear_reference(x, packed)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield lambda: torch.testing.assert_close(linear(x, packed), want, atol=1e-4, rtol=1e-4)
    torch.set_num_threads(before)


def test_many_jobs_one_after_the_other(product):
    for _ in range(300):
        product()


def test_helpers_that_sleep_are_woken(product):
    for _ in range(5):
        product()
        time.sleep(0.02)


def test_callers_at_the_same_time(product):
    failures = []

    def call():
        try:
            for _ in range(100):
                product()
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failures
    assert not any(caller.is_alive() for caller in callers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_again(product):
    product()
    child = os.fork()
    if child == 0:
        try:
            for _ in range(50):
                product()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, 9)
    pytest.fail("the forked process hangs")
