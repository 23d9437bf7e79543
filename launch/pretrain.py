#!/usr/bin/env python3
"""Pretrain a spiking language model; see --help. Started by deepspeed, torchrun, srun or plain python."""

import sys

from spikescale.training.ending import end_process
from spikescale.training.start import main

if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
