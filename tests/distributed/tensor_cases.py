"""SpikeGPT divided over two ranks against SpikeGPT in one process; rank 0 writes what differs.

    torchrun --standalone --nproc-per-node 2 tensor_cases.py results.json run.yaml "name=a zero.stage=0" ...

Every rank computes the whole model itself and holds its own part against it. Then come pretraining runs, each
what launch/pretrain.py does with those settings: one start of torch, DeepSpeed and megatron-core serves all.
"""

import faulthandler
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from model_cases import VARIANTS, make_config, make_model, record_spikes

from spikescale.config import load_config
from spikescale.config.schema import NeuronConfig
from spikescale.errors import UserError
from spikescale.inference import SamplingSettings, generate
from spikescale.model import SpikeGPT
from spikescale.parallel import Layout
from spikescale.parallel.shards import full_tensor, is_sharded
from spikescale.parallel.tensor import TensorParts, tensor_parts
from spikescale.training import engine as engines
from spikescale.training.bootstrap import Process, join_processes, leave_processes, prepare_process
from spikescale.training.ending import end_process
from spikescale.training.pretrain import pretrain

SECONDS = 240  # after which a worker that hangs ends itself
WIDTH = 34  # 17 channels a rank
LENGTH = 40


@dataclass(frozen=True)
class Case:
    """A model and how it is run."""

    variant: str
    vocabulary: int = 51  # 26 rows a rank, the last one padding
    regulariser: float = 0.1
    dtype: str = "float32"
    dropout: float = 0.0
    checkpointed: bool = False
    documents: bool = False  # new ones begin inside the sequences
    earlier: bool = False  # the sequences go on from a chunk whose gradient is wanted too


CASES = [
    *(Case(variant) for variant in VARIANTS),
    *(Case(variant, dtype="float64") for variant in VARIANTS),
    *(Case(variant, checkpointed=True, documents=True) for variant in ("spikegpt-b", "spikegpt-driven")),
    *(Case(variant, earlier=True, dtype="float64") for variant in VARIANTS),
    Case("spikegpt", dropout=0.3),
    Case("spikegpt-driven", dropout=0.3, checkpointed=True),
    Case("spikegpt", vocabulary=50, regulariser=0.0),
    Case("rwkv", regulariser=10.0),
]


def make_parts(case: Case, parts: TensorParts) -> tuple[SpikeGPT, SpikeGPT]:
    """The case's whole model, and this rank's part of the same."""
    # So that the neurons between projections fire, too.
    neuron = NeuronConfig(v_threshold=0.3 if case.variant == "spikegpt-driven" else 1.0)
    changes = {"width": WIDTH, "vocab_size": case.vocabulary, "dropout": case.dropout, "neuron": neuron}
    whole = make_model(case.variant, **changes)
    divided = SpikeGPT(make_config(case.variant, **changes), parts=TensorParts(parts.group, case.vocabulary))
    with torch.no_grad():
        for mine, full in zip(divided.parameters(), whole.parameters(), strict=True):
            mine.copy_(divided.parts.local_slice(full, mine))
    for model in (whole, divided):
        model.to(getattr(torch, case.dtype))
        model.activation_checkpointing = case.checkpointed
    return whole, divided


def make_tokens(case: Case, length: int, seed: int) -> Tensor:
    """(2, length) ids; the last id, beside the padding, is among them."""
    tokens = torch.randint(0, case.vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, ::7] = case.vocabulary - 1
    return tokens


def backward(model: SpikeGPT, case: Case, reset: Tensor | None) -> float:
    """Gradients of the loss; the loss."""
    state = None
    if case.earlier:
        _, state = model(make_tokens(case, 9, seed=4))
    torch.manual_seed(5)
    tokens = make_tokens(case, LENGTH + 1, seed=3)
    logits, _ = model(tokens[:, :-1], state, reset)
    loss, _ = model.parts.loss(logits, tokens[:, 1:], case.regulariser)
    loss.backward()
    return float(loss.detach())


def own_channels(full: Tensor, mine: Tensor) -> Tensor:
    """The channels of `full` (B, T, C) that this rank computed, if it did not compute all."""
    return full.narrow(-1, dist.get_rank() * mine.shape[-1] % full.shape[-1], mine.shape[-1])


def errors(case: Case, parts: TensorParts) -> dict[str, float]:
    """Largest differences: of loss, logits and gradients relative, of spikes their number."""
    reset = None
    if case.documents:
        reset = torch.zeros(2, LENGTH, dtype=torch.bool)
        reset[0, [5, 20]] = reset[1, [LENGTH - 3]] = True
    whole, divided = make_parts(case, parts)
    expected, loss = backward(whole, case, reset), backward(divided, case, reset)
    found = {"loss": abs(loss - expected) / expected, "gradient": 0.0}
    for (name, mine), full in zip(divided.named_parameters(), whole.parameters(), strict=True):
        assert full.grad is not None
        assert mine.grad is not None
        difference = mine.grad - divided.parts.local_slice(full.grad, mine)
        relative = float(difference.norm() / full.grad.norm())
        assert relative == relative, f"{case}: the gradient of {name} is zero or no number"
        found["gradient"] = max(found["gradient"], relative)
    norm = engines.local_gradient_norm(whole)
    found["norm"] = abs(engines.local_gradient_norm(divided, parts.group) - norm) / norm

    fired, own_fired = record_spikes(whole), record_spikes(divided)
    tokens = make_tokens(case, LENGTH, seed=3)
    with torch.no_grad():
        logits, _ = whole.eval()(tokens, None, reset)
        own_logits, _ = divided.eval()(tokens, None, reset)
        own_logits = divided.parts.gather(own_logits)
    found["logits"] = float((own_logits[..., : case.vocabulary] - logits).abs().max() / logits.abs().max())
    found["spikes"] = sum(
        int((own_fired[name][0] != own_channels(fired[name][0], own_fired[name][0])).sum()) for name in fired
    )
    return found


def bfloat16_errors(variant: str, parts: TensorParts) -> dict[str, float]:
    """Loss and gradient of the whole model and of the divided one under autocast, against float32."""
    case = Case(variant)
    exact, _ = make_parts(case, parts)
    whole, divided = make_parts(case, parts)
    reference = backward(exact, case, None)
    found = {}
    for name, model in (("whole", whole), ("divided", divided)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[f"{name}_loss"] = abs(backward(model, case, None) - reference) / reference
        differences, norms = 0.0, 0.0
        for mine, full in zip(model.parameters(), exact.parameters(), strict=True):
            assert mine.grad.dtype == torch.float32
            expected = model.parts.local_slice(full.grad, mine)
            differences += float((mine.grad - expected).square().sum())
            norms += float(expected.square().sum())
        found[f"{name}_gradient"] = (differences / norms) ** 0.5
    return found


def initial_differences(variant: str, parts: TensorParts) -> dict[str, float]:
    """Initial weights, put together, that are not those of one process; padding that is not zero."""
    config = make_config(variant, width=WIDTH, vocab_size=51)
    whole, divided = SpikeGPT(config, seed=3), SpikeGPT(config, seed=3, parts=parts)
    names = dict(whole.named_parameters())
    different, padding, sharded = 0, 0, 0
    for name, mine in divided.named_parameters():
        full = full_tensor(mine.detach(), mine, parts.group)
        assert (full is not None) == (parts.rank == 0)
        if full is not None:
            different += int((full != names[name]).sum()) + int(full.shape != names[name].shape)
        sharded += is_sharded(mine)
        if name in ("embedding.weight", "head.weight") and parts.rank == parts.size - 1:
            padding += int((mine[-1] != 0).sum())
    parameters = divided.count_parameters() == whole.count_parameters()
    bare = divided.count_parameters(embeddings=False) == whole.count_parameters(embeddings=False)
    return {
        "different": different,
        "padding": padding,
        "sharded": sharded,
        "miscounted": int(not (parameters and bare)),
    }


def generated_differences(variant: str, parts: TensorParts) -> int:
    """Tokens drawn by both ranks together that are not those of one process."""
    whole, divided = make_parts(Case(variant), parts)
    prompts, settings = make_tokens(Case(variant), 12, seed=6), SamplingSettings(seed=2, max_tokens=20)
    drawn = []
    for model in (whole, divided.parts.whole_logits(divided)):
        words = {"eos_id": 0, "settings": settings, "vocab_size": 49, "engine": "torch"}
        drawn.append(torch.stack(list(generate(model, prompts, **words))))
    return int((drawn[0] != drawn[1]).sum())


def refusal_without_groups(run_file: Path, layout: Layout, process: Process, parts: TensorParts) -> str:
    """What is said when DeepSpeed is not told of the groups, and all else fits ranks that share nothing."""
    config = load_config(run_file, ["parallel.tensor=2", "zero.stage=1"])
    alone = engines.deepspeed_settings(config, Layout(layout.rank, layout.world_size))
    with (
        mock.patch.object(engines, "model_parallel_unit", return_value=None),
        mock.patch.object(engines, "deepspeed_settings", return_value=alone),
    ):
        try:
            engines.build_engine(make_parts(Case("spikegpt"), parts)[1], config, process, layout)
        except UserError as error:
            return str(error)
    return ""


def largest(values: dict[str, float]) -> dict[str, float]:
    """The largest of both ranks, number by number."""
    numbers = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return dict(zip(values, numbers.tolist(), strict=True))


def main(output: Path, run_file: Path, runs: list[str]) -> None:
    """Run all cases, then train every run to its end."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    process = prepare_process()
    join_processes(process)
    layout = Layout(process.rank, process.world_size, tensor=2)
    parts = tensor_parts(layout, make_config(width=WIDTH, vocab_size=51))
    results = {
        "cases": [{**asdict(case), "errors": largest(errors(case, parts))} for case in CASES],
        "initial": {variant: largest(initial_differences(variant, parts)) for variant in VARIANTS},
        "bfloat16": {variant: largest(bfloat16_errors(variant, parts)) for variant in VARIANTS},
        "generated": {variant: generated_differences(variant, parts) for variant in VARIANTS},
        "refusal": refusal_without_groups(run_file, layout, process, parts),
    }
    if process.is_main:
        output.write_text(json.dumps(results, indent=1))
    for settings in runs:
        pretrain(load_config(run_file, settings.split()), process)
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    end_process(0)
