"""One group of ranks that saves a tiny model in several layouts and loads what other groups have saved.

    RANK=.. WORLD_SIZE=.. ... python checkpoint_layouts.py FOLDER GROUP

Groups run at the same time and meet in FOLDER: each trains and saves in its own layouts, waits for the
others, then loads every checkpoint into each of its engines, which have gone on training meanwhile. What
was loaded is compared, bit for bit, with what DeepSpeed's own functions read from the engine that saved it.
"""

import faulthandler
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from spikescale.config import RunConfig
from spikescale.data_pipeline.tokenizers.byte import ByteTokenizer
from spikescale.model import SpikeGPT
from spikescale.parallel import Layout
from spikescale.parallel.shards import full_tensor
from spikescale.parallel.tensor import tensor_parts
from spikescale.training.bootstrap import Process, join_processes, leave_processes, prepare_process
from spikescale.training.checkpoint import CheckpointFolder, verify_checkpoint
from spikescale.training.convert import consolidate
from spikescale.training.ending import end_process
from spikescale.training.engine import build_engine, micro_batching

SECONDS = 240  # after which a worker that hangs ends itself
BEFORE, AFTER = 3, 2  # optimizer steps before a save, and those whose losses are compared
BATCH, CONTEXT, VOCABULARY = 4, 12, 261  # no number of ranks divides the vocabulary
KINDS = ("weight", "exp_avg", "exp_avg_sq")
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "one": {
        "one-z0": {"stage": 0},
        "one-z1": {"stage": 1},
        "one-z3": {"stage": 3},
    },
    "two": {
        "two-z0": {"stage": 0},
        "two-z1": {"stage": 1},
        "two-z2": {"stage": 2},
        "two-z3": {"stage": 3},
        "two-z2-cpu": {"stage": 2, "offload_optimizer": "cpu"},
        "two-z3-cpu": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        "two-z3-nvme": {
            "stage": 3,
            "offload_optimizer": "nvme",
            "reduce_bucket_size": 6000,  # several sub-groups, read in one after the other
        },
    },
    "tensor": {
        "tensor-z0": {"stage": 0},
        "tensor-z1": {"stage": 1},
    },
}
CONVERTED = "tensor-z1"
SMALLEST_SWAPPED = 4096  # bytes; DeepSpeed's own limit is a mebibyte


class FileHandle:
    """The interface of DeepSpeed's async_io extension on plain reads and writes, which need no libaio.

    All of DeepSpeed's swapping around it is the real one.
    """

    def __init__(self, **settings: Any) -> None:
        self.locked: list[torch.Tensor] = []
        self.pending = 0

    def new_cpu_locked_tensor(self, length: int, example: torch.Tensor) -> torch.Tensor:
        self.locked.append(torch.empty(length, dtype=example.dtype))
        return self.locked[-1]

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> None:
        self.locked = [other for other in self.locked if other.data_ptr() != tensor.data_ptr()]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        ends = [(own.data_ptr(), own.data_ptr() + own.nbytes) for own in self.locked]
        return tensor.numel() > 0 and any(start <= tensor.data_ptr() < end for start, end in ends)

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        content = torch.from_file(path, size=tensor.numel(), dtype=tensor.dtype)
        tensor.copy_(content)
        self.pending += 1
        return 0

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        Path(path).write_bytes(tensor.detach().contiguous().numpy().tobytes())
        self.pending += 1
        return 0

    def wait(self) -> int:
        done, self.pending = self.pending, 0
        return done


def swap_to_files() -> None:
    """Let NVMe offload work here, and for tensors as small as those of this model."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import aio_config, optimizer_utils

    AsyncIOBuilder.load = lambda self, verbose=True: SimpleNamespace(aio_handle=FileHandle)
    aio_config.AIO_DEFAULT_DICT["block_size"] = SMALLEST_SWAPPED
    optimizer_utils.MIN_AIO_BYTES = SMALLEST_SWAPPED


@dataclass
class Trainer:
    """An engine in one layout, and what a training loop does with it."""

    name: str
    config: RunConfig
    layout: Layout
    process: Process

    def __post_init__(self) -> None:
        self.parts = tensor_parts(self.layout, self.config.model)
        self.model = SpikeGPT(self.config.model, seed=1, parts=self.parts)
        self.engine = build_engine(self.model, self.config, self.process, self.layout)

    def batches(self, step: int) -> Iterator[torch.Tensor]:
        """This rank's micro-batches of a step, a pure function of the step."""
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
        share = BATCH // self.layout.data
        micro, _ = micro_batching(self.config, self.layout.data)
        return iter(tokens[self.layout.data_rank * share :][:share].split(micro))

    def backward(self, tokens: torch.Tensor, scale: float = 1.0) -> float:
        logits, _ = self.engine(tokens[:, :-1])
        total, loss = self.parts.loss(logits, tokens[:, 1:], 0.0)
        self.engine.backward(total * scale)
        return float(loss.detach())

    def train(self, first: int, steps: int) -> list[float]:
        """The mean loss over ranks of each step."""
        losses = []
        for step in range(first, first + steps):
            found = []
            for tokens in self.batches(step):
                found.append(self.backward(tokens))
                self.engine.step()
            mean = torch.tensor(sum(found) / len(found), dtype=torch.float64)
            dist.all_reduce(mean)
            losses.append(float(mean) / self.layout.world_size)
        return losses

    def spoil(self) -> None:
        """A half-accumulated gradient that is no number."""
        self.backward(next(self.batches(0)), scale=float("nan"))

    def state(self) -> tuple[dict[str, torch.Tensor], float]:
        """Weights and moments, whole, as DeepSpeed's own functions give them; Adam's count of steps."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = {}
        optimizer = self.engine.optimizer
        if self.config.zero.stage in (1, 2):
            # DeepSpeed looks for moments after the first group's first step, when the others have none yet.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.engine.module.named_parameters():
            for kind in KINDS:
                if self.config.zero.stage == 0:
                    value = parameter.detach() if kind == "weight" else optimizer.state[parameter][kind]
                elif kind == "weight":
                    value = safe_get_full_fp32_param(parameter)
                    if self.config.zero.stage < 3:
                        assert torch.equal(value.view_as(parameter), parameter), name
                else:
                    value = safe_get_full_optimizer_state(parameter, kind)
                if self.config.zero.stage < 3:
                    value = value.view_as(parameter)
                whole = full_tensor(value.detach(), parameter, self.parts.group)
                if whole is not None:
                    found[f"{name}/{kind}"] = whole.clone()
        inner = optimizer if self.config.zero.stage == 0 else optimizer.optimizer
        counts = {float(state["step"]) for state in inner.state.values() if state}
        assert len(counts) == 1, counts
        return found, counts.pop()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kinds: tuple[str, ...]) -> bool:
    names = [name for name in expected if name.rpartition("/")[2] in kinds]
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in names)


def save_all(trainers: list[Trainer], folder: Path) -> None:
    """Train, save, go on training; rank 0 keeps what must come out of each checkpoint."""
    for trainer in trainers:
        trainer.train(0, BEFORE)
        checkpoints = CheckpointFolder(
            folder / trainer.name, trainer.process, trainer.layout, trainer.parts.group
        )
        torch.manual_seed(10 + trainer.layout.rank)
        expected, count = trainer.state()
        checkpoints.save(
            trainer.engine, trainer.config, ByteTokenizer(), {"step": BEFORE, "data": {}}, {"valid_loss": 1.0}
        )
        drawn = float(torch.rand(()))
        losses = trainer.train(BEFORE, AFTER)
        checkpoints.finish()
        drawings: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(drawings, drawn)
        if trainer.process.is_main:
            save_file(expected, folder / f"{trainer.name}.expected")
            facts = {"step": count, "losses": losses, "drawn": drawings}
            (folder / f"{trainer.name}.json").write_text(json.dumps(facts))


def load_all(trainers: list[Trainer], sources: list[str], folder: Path) -> list[dict[str, Any]]:
    """Load every checkpoint into every engine and go on from it; how that compares with its origin."""
    results = []
    for trainer in trainers:
        checkpoints = CheckpointFolder(folder / f"into-{trainer.name}", trainer.process, trainer.layout)
        for source in sources:
            expected = load_file(folder / f"{source}.expected")
            facts = json.loads((folder / f"{source}.json").read_text())
            checkpoint = verify_checkpoint(folder / source / f"step-{BEFORE:08d}")
            trainer.spoil()
            note = checkpoints.load(checkpoint, trainer.engine, trainer.config)
            drawn = float(torch.rand(()))
            found, count = trainer.state()
            losses = trainer.train(BEFORE, AFTER)
            drawings: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(drawings, drawn)
            if trainer.process.is_main:
                results.append(
                    {
                        "source": source,
                        "target": trainer.name,
                        "weights": same(found, expected, KINDS[:1]),
                        "moments": same(found, expected, KINDS[1:]),
                        "step": count == facts["step"] == BEFORE,
                        "losses": losses,
                        "expected_losses": facts["losses"],
                        "random": drawings == facts["drawn"],
                        "note": note,
                    }
                )
    return results


def main(folder: Path, group: str) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    process = prepare_process()
    join_processes(process)
    swap_to_files()
    layouts = GROUPS[group]
    layout = Layout(process.rank, process.world_size, tensor=2 if group == "tensor" else 1)
    trainers = []
    for number, (name, zero) in enumerate(layouts.items()):
        nvme = "nvme" in zero.values()
        if nvme and process.is_main:
            (folder / name / "nvme").mkdir(parents=True)
        dist.barrier()
        config = RunConfig.model_validate(
            {
                "data": {"path": Path("unused")},
                "model": {
                    "layers": 1,
                    "width": 16,
                    "context_length": CONTEXT,
                    "vocab_size": VOCABULARY,
                    "backend": "reference",  # nothing to compile
                },
                "train": {
                    "batch_size": BATCH,
                    "micro_batch_size": 1,
                    "weight_decay": 0.1,
                    "save_async": number % 2 == 1,
                },
                "zero": {**zero, "nvme_path": folder / name / "nvme" if nvme else None},
                "parallel": {"tensor": layout.tensor},
            }
        )
        trainers.append(Trainer(name, config, layout, process))
    save_all(trainers, folder)
    dist.barrier()
    if process.is_main:
        (folder / f"{group}.saved").touch()
    for other in GROUPS:
        wait_for(folder / f"{other}.saved")
    sources = [name for other in GROUPS.values() for name in other]
    if group == "one":
        # One part made of those of two ranks that each hold a part of the model.
        consolidate(folder / CONVERTED / f"step-{BEFORE:08d}", folder / "converted" / f"step-{BEFORE:08d}")
        for kind in ("expected", "json"):
            shutil.copyfile(folder / f"{CONVERTED}.{kind}", folder / f"converted.{kind}")
        sources.append("converted")
    results = load_all(trainers, sources, folder)
    if process.is_main:
        (folder / f"{group}.results").write_text(json.dumps(results))
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    end_process(0)
