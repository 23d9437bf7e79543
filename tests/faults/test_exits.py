"""Which errors mean that another rank is gone, and how they are told."""

import pytest
import torch.distributed as dist

from spikescale.faults.exits import is_lost_rank, lost_reason, shell_code, signal_name

CLOSED = (
    "[/build/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242. This is"
    " typically caused by a remote worker crashing. Check the logs."
)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(CLOSED), True),
        (
            RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv"),
            True,
        ),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_broken_connections_are_told_from_other_errors(error, lost):
    assert is_lost_rank(error) == lost


def test_the_reason_is_one_short_sentence():
    assert lost_reason(RuntimeError(CLOSED)) == "Connection closed by peer [127.0.0.1]:4242"


def test_codes_of_signals_have_their_names():
    assert (signal_name(-9), shell_code(-9)) == ("SIGKILL", 137)
    assert (signal_name(1), shell_code(1)) == (None, 1)
