"""SpikeGPT over the ranks of a context group against SpikeGPT in one process; rank 0 writes what differs.

    torchrun --standalone --nproc-per-node 3 context_cases.py errors.json

Every rank computes the reference itself and holds its own part against it.
"""

import faulthandler
import json
import signal
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from model_cases import VARIANTS, VOCABULARY, make_model, record_spikes

from spikescale.config.schema import NeuronConfig
from spikescale.model import SpikeGPT, State
from spikescale.model.state import detach_state
from spikescale.parallel import Layout
from spikescale.parallel.context import ContextRelay, part_of
from spikescale.training.ending import end_process

SECONDS = 90  # after which a worker that hangs ends itself
LENGTH = 42  # tokens of a sequence: divisible by 2 and 3
REGULARISER = 1e-2


@dataclass(frozen=True)
class Case:
    """A model and how it is run."""

    variant: str
    ranks: int = 2
    dtype: str = "float32"
    checkpointed: bool = False
    documents: bool = False  # new ones begin inside the parts and at a boundary between them
    micro_batches: int = 1
    earlier: bool = False  # the sequences continue a text of which the first rank has the state
    frozen_embedding: bool = False


CASES = [
    *(Case(variant, dtype=dtype) for variant in VARIANTS for dtype in ("float32", "float64")),
    *(Case(variant, checkpointed=True) for variant in VARIANTS),
    Case("spikegpt", ranks=3),
    Case("spikegpt-driven", ranks=3, checkpointed=True, micro_batches=2, earlier=True),
    Case("spikegpt-b", ranks=3, documents=True, earlier=True),
    Case("spikegpt", documents=True, checkpointed=True, micro_batches=2),
    Case("spikegpt", frozen_embedding=True),
    Case("rwkv", ranks=3, earlier=True, dtype="float64"),
]


def make(case: Case) -> SpikeGPT:
    """The case's model, the same on every rank; its odd number of blocks is more than one."""
    # Low enough that the neurons of the driven variant fire too: each weight must have a gradient.
    neuron = NeuronConfig(v_threshold=0.2)
    model = make_model(case.variant, layers=3, neuron=neuron).to(getattr(torch, case.dtype))
    model.activation_checkpointing = case.checkpointed
    model.embedding.requires_grad_(not case.frozen_embedding)
    return model


def random_tokens(length: int, seed: int) -> Tensor:
    """(2, length) ids."""
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def backward(
    model: SpikeGPT, tokens: Tensor, reset: Tensor | None, state: State | None, passes: int, relay=None
) -> float:
    """Gradients of the mean loss over `tokens` (B, T + 1), accumulated over `passes` parts of the batch."""
    total = 0.0
    rows = tokens.shape[0] // passes
    for part in range(passes):
        mine = slice(part * rows, (part + 1) * rows)
        before = state and [{key: entry[mine] for key, entry in block.items()} for block in state]
        starts = None if reset is None else reset[mine]
        logits, _ = model(tokens[mine, :-1], before, starts, relay=relay)
        # As `language_model_loss`, but in the logits' dtype.
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[mine, 1:].flatten())
        loss = loss + 0.5 * REGULARISER * logits.max(dim=-1).values.square().mean()
        (loss / passes).backward()
        total += float(loss.detach()) / passes
    return total


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest element."""
    return float((found - expected).abs().max() / expected.abs().max())


def largest(difference: float, group: dist.ProcessGroup) -> float:
    """The largest over the group."""
    value = torch.tensor(difference, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return float(value)


def errors(case: Case, layout: Layout, relay: ContextRelay, group: dist.ProcessGroup) -> dict[str, float]:
    """Largest differences over the group: of loss and gradients relative, of spikes their number."""
    tokens = random_tokens(LENGTH + 1, seed=3)
    reset = None
    if case.documents:
        reset = torch.zeros(2, LENGTH, dtype=torch.bool)
        reset[0, [5, LENGTH // case.ranks]] = reset[1, [LENGTH - 3]] = True
    whole, parted = make(case), make(case)
    state = None
    if case.earlier:
        with torch.no_grad():
            state = detach_state(whole(random_tokens(17, seed=4))[1])
    first = layout.context_rank == 0
    own = slice(layout.context_rank * LENGTH // case.ranks, (layout.context_rank + 1) * LENGTH // case.ranks)
    mine, own_reset = part_of(tokens, layout), None if reset is None else reset[:, own]

    expected = backward(whole, tokens, reset, state, case.micro_batches)
    loss = backward(parted, mine, own_reset, state if first else None, case.micro_batches, relay)
    mean = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(mean, group=group)
    found = {"loss": abs(float(mean) / case.ranks - expected) / expected, "gradient": 0.0}
    for (name, parameter), reference in zip(parted.named_parameters(), whole.parameters(), strict=True):
        if reference.grad is None:
            assert parameter.grad is None, name
            continue
        dist.all_reduce(parameter.grad, group=group)
        assert reference.grad.norm() > 0, f"{case}: the gradient of {name} is zero"
        difference = (parameter.grad / case.ranks - reference.grad).norm() / reference.grad.norm()
        found["gradient"] = max(found["gradient"], float(difference))

    fired, own_fired = record_spikes(whole), record_spikes(parted)
    with torch.no_grad():
        logits, end = whole.eval()(tokens[:, :-1], state, reset)
        own_logits, own_end = parted.eval()(mine[:, :-1], state if first else None, own_reset, relay=relay)
    found["logits"] = relative(own_logits, logits[:, own])
    found["spikes"] = sum(int((own_fired[name][0] != fired[name][0][:, own]).sum()) for name in fired)
    found["state"] = 0.0
    if layout.context_rank == case.ranks - 1:
        for block, own_block in zip(end, own_end, strict=True):
            assert block.keys() == own_block.keys()
            differences = [relative(own_block[key], block[key]) for key in block]
            found["state"] = max(found["state"], *differences)
    return {name: largest(value, group) for name, value in found.items()}


def main(output: Path) -> None:
    """Run all cases; ranks outside of a case's group pass over it."""
    faulthandler.register(signal.SIGALRM, chain=True)  # says where it hangs, then ends
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    rank = dist.get_rank()
    relays = {}
    for size in (2, 3):
        group = dist.new_group(list(range(size)))
        if rank < size:
            relays[size] = (Layout(rank, size, context=size), ContextRelay(range(size), rank, group), group)
    mine = [case for case in CASES if case.ranks in relays]
    results = [{**asdict(case), "errors": errors(case, *relays[case.ranks])} for case in mine]
    for _, relay, _ in relays.values():
        relay.finish()
    if rank == 0:
        output.write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
