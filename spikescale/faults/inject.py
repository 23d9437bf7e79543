"""Faults on purpose, for tests and benchmarks: brings about what `faults.inject` says (its words: plan.py).

Without such words nothing here does anything.
"""

import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import nn

from spikescale.faults.plan import DATA, FOR_EVER, ONCE, SAVES, Fault, parse_faults

SPIKE_FACTOR = 25.0


class Injector:
    """Brings about the faults of `text` on this rank of a run in `folder`; `model` is the one that trains."""

    def __init__(self, text: str, rank: int, folder: Path, model: nn.Module) -> None:
        self._faults = parse_faults(text)
        self._rank, self._folder = rank, folder
        self._silence = [fault for fault in self._faults if fault.kind == "silence"]
        self._silenced: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._model = model

    def change_loss(self, loss: torch.Tensor, batch: int) -> torch.Tensor:
        """The loss of batch number `batch` (from 1) as the faults make it."""
        for fault in self._faults:
            if fault.kind in DATA and fault.is_at(batch):
                loss = loss * (float("nan") if fault.kind == "nan" else SPIKE_FACTOR)
        return loss

    def begin_step(self, step: int) -> None:
        """Silence the neurons that are to be silent in step number `step` (from 1), and no others."""
        from spikescale.model.neuron import Neuron

        if not self._silence:
            return
        wanted = {fault.module for fault in self._silence if fault.is_at(step)}
        for name, module in self._model.named_modules():
            silent = any(name == part or name.startswith(f"{part}.") for part in wanted)
            if isinstance(module, Neuron) and silent != (name in self._silenced):
                if silent:
                    self._silenced[name] = module.register_forward_pre_hook(_far_below_threshold)
                else:
                    self._silenced.pop(name).remove()

    def within_step(self, step: int) -> None:
        """What comes in the middle of step number `step`."""
        for fault in self._faults:
            if fault.kind in ONCE and fault.rank == self._rank and fault.is_at(step) and self._first(fault):
                if fault.kind == "hang":
                    time.sleep(FOR_EVER)
                elif fault.kind == "pause":
                    while not (self._folder / "continue").exists():
                        time.sleep(0.05)
                    (self._folder / "continue").unlink()
                else:
                    os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else _signal(fault.kind))

    def begin_save(self, step: int, checkpoints: Path) -> None:
        """What comes while the checkpoint of `step` is written below `checkpoints`."""
        for fault in self._faults:
            if fault.kind in SAVES and fault.rank == self._rank and fault.is_at(step) and self._first(fault):
                threading.Thread(target=_kill_when_writing, args=(checkpoints,), daemon=True).start()

    def _first(self, fault: Fault) -> bool:
        marker = self._folder / "injected" / fault.name
        if marker.exists():
            return False
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        return True


def _signal(kind: str) -> signal.Signals:
    return signal.SIGTERM if kind == "sigterm" else signal.SIGUSR1


def _far_below_threshold(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    current, *rest = arguments
    return (current - 1e4, *rest)


def _kill_when_writing(checkpoints: Path) -> None:
    while not any(path.is_file() for folder in checkpoints.glob(".tmp-step-*") for path in folder.rglob("*")):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)
