"""What the tests over several hosts share: the small corpus, and hosts where the machine can make them."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

from hosts import HostsUnavailableError, TwoHosts
from launching import write_corpus
from needs import skip_or_fail


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """The small corpus as byte-level shards."""
    from spikescale.cli.main import main

    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "text")
    words = ["data", "prepare", "--source", str(folder / "text"), "--tokenizer", "byte", "--no-ray"]
    words += ["--output", str(folder / "prepared"), "--valid-fraction", "0.1", "--test-fraction", "0.1"]
    assert main(words) == 0
    return folder / "prepared"


@pytest.fixture(scope="module")
def two_hosts():
    """node1 and node2, for the tests of one file."""
    try:
        with TwoHosts() as hosts:
            yield hosts
    except HostsUnavailableError as error:
        skip_or_fail(str(error))


@pytest.fixture(scope="session")
def host_environment() -> dict[str, str]:
    """Variables of every training process here: this interpreter's programs, one thread, no GPU."""
    binaries = Path(sys.executable).parent
    return {"PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
