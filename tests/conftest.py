"""Settings shared by all tests."""

import os

# Two test processes on two cores must not each start two threads; must be set before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
