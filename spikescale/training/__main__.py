"""`python -m spikescale.training`: what launch/pretrain.py is, where only the package is installed."""

import sys

from spikescale.training.ending import end_process
from spikescale.training.start import main

if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
