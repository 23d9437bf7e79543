"""Settings shared by all tests."""

import os
import re

import pytest

# Two test processes on two cores must not each start two threads; must be set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels run in its interpreter, on CPU tensors, unless only GPU tests are asked for.

    Triton reads the variable when it is first imported, and a process can interpret or compile, not both:
    `pytest` interprets, `pytest -m gpu` compiles and runs on the GPU.
    """
    if not re.match(r"gpu\b", config.getoption("markexpr")):
        os.environ["TRITON_INTERPRET"] = "1"
