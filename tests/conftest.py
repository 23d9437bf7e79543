"""Settings shared by all tests."""

import os
import re
import secrets
from collections.abc import Iterator

import pytest

# Two test processes on two cores must not each start two threads; must be set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's processes ask each other for a token, and take the mode from the environment when they start. One
# token for all test processes: left alone, the first local Ray writes one into the home folder and turns
# the mode on in its own process, and what was started before or in another environment answers no more.
os.environ.setdefault("RAY_AUTH_MODE", "token")
if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels run in its interpreter, on CPU tensors, unless only GPU tests are asked for.

    Triton reads the variable when it is first imported, and a process can interpret or compile, not both:
    `pytest` interprets, `pytest -m gpu` compiles and runs on the GPU.
    """
    if not re.match(r"gpu\b", config.getoption("markexpr")):
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """What a test sets in this process (a rank's place, say) does not reach the programs of the next one."""
    before = dict(os.environ)
    yield
    for name in (before.keys() | os.environ.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]
