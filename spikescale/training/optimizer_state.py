"""Where DeepSpeed keeps the training state of each parameter, for reading it out and putting it back.

Weights are float32 and DeepSpeed's master copies are equal to them to the bit, so that a parameter's
state is its value, Adam's two moments, and Adam's count of steps. Who owns which part of it:

    ZeRO 0    every rank of a replica group owns everything; the ranks write equal shares of it
    ZeRO 1, 2 the parameters of a group lie flat, one after the other; each rank owns a range of that,
              which may begin and end inside a parameter
    ZeRO 3    each parameter is divided over the ranks, padded at its end; the rank's parts of several
              parameters lie flat in a sub-group, which may be on the CPU, or on NVMe between steps

The names used here are those of DeepSpeed 0.19; nothing outside this file knows them.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spikescale.errors import UserError
from spikescale.parallel import Layout
from spikescale.parallel.shards import is_sharded
from spikescale.training.fragments import Fragment, Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


class StateSource(Protocol):
    """Where the state to put back comes from, in any range (`StoredState`)."""

    def weights(
        self, name: str, shape: tuple[int, ...], shard: Shard | None, start: int, stop: int
    ) -> Tensor: ...

    def moments(
        self, name: str, key: str, shape: tuple[int, ...], shard: Shard | None, start: int, stop: int
    ) -> Tensor: ...

    def keys(self, name: str) -> tuple[str, ...]: ...

    def step(self, name: str) -> float: ...


@dataclass(frozen=True)
class _Piece:
    """The range [start, stop) of a flattened local parameter, which begins at `offset` in its flat group."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class _Group:
    """A tensor that the inner optimizer steps on, and which parameters' ranges lie in it."""

    flat: Tensor
    pieces: list[_Piece]
    index: int


def read_fragments(engine: Any, layout: Layout) -> list[Fragment]:
    """Copies in host memory of the optimizer's state that this rank is to write.

    Over all ranks every element comes once. Under NVMe offload one sub-group at a time is read in.
    """
    replicas = layout.world_size // layout.tensor
    fragments = []
    for group in _groups(engine, layout.rank // layout.tensor, replicas):
        with _in_memory(engine, group, write=False):
            state = _adam_state(engine, group.flat)
            for piece in group.pieces:
                shard = _shard(piece.parameter, layout)
                if piece.start >= piece.stop or (shard is None and layout.tensor_rank):
                    continue  # a replicated parameter is the same on all ranks of a tensor group
                span = slice(piece.offset, piece.offset + piece.stop - piece.start)
                tensors = {
                    key: value.detach().view(-1)[span].to("cpu", copy=True)
                    for key, value in state.items()
                    if key != "step" and torch.is_tensor(value) and value.shape == group.flat.shape
                }
                fragments.append(
                    Fragment(
                        piece.name,
                        _local_shape(piece.parameter),
                        shard,
                        piece.start,
                        piece.stop,
                        float(state["step"]),
                        tensors,
                    )
                )
    return fragments


@torch.no_grad()
def write_state(engine: Any, layout: Layout, source: StateSource) -> None:
    """Make weights and optimizer state those of `source`; every rank calls it. Gradients are dropped.

    It reads the ranges that this rank owns and no others; the ranks then exchange weights as after a step.
    Raises UserError when the source holds other optimizer tensors than this optimizer keeps.
    """
    clear_gradients(engine)
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # gathered weights are released
    for group in _groups(engine, 0, 1):
        with _in_memory(engine, group, write=True):
            state = _adam_state(engine, group.flat)
            moments = {key: state[key].detach().view(-1) for key in MOMENTS}
            values = group.flat.detach().view(-1)
            for tensor in (values, *moments.values()):
                tensor.zero_()  # what pads a group may hold a NaN of a step that went wrong
            for piece in group.pieces:
                if piece.start >= piece.stop:
                    continue
                if set(source.keys(piece.name)) != set(MOMENTS):
                    raise UserError(
                        f"{piece.name}: the checkpoint has {', '.join(source.keys(piece.name))} of its"
                        f" optimizer, this one keeps {', '.join(MOMENTS)}"
                    )
                local = (_local_shape(piece.parameter), _shard(piece.parameter, layout))
                span = slice(piece.offset, piece.offset + piece.stop - piece.start)
                values[span] = source.weights(piece.name, *local, piece.start, piece.stop).to(values)
                for key, moment in moments.items():
                    stored = source.moments(piece.name, key, *local, piece.start, piece.stop)
                    moment[span] = stored.to(moment)
            if group.pieces:
                _set_step(state, source.step(group.pieces[0].name))
            if stage == 3:
                optimizer._reassign_or_swap_out_partitioned_parameters(group.index)
    if stage in (1, 2):
        optimizer.update_lp_params()  # the module's weights become those of the partitions of all ranks
    elif stage == 3:
        optimizer.checkpoint_event_epilogue()  # weights that every rank keeps whole are gathered


def clear_gradients(engine: Any) -> None:
    """Drop all gradients, also those accumulated so far; the accumulation starts afresh. No communication."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    for parameter in engine.module.parameters():
        parameter.grad = None
    if stage == 0:
        optimizer.zero_grad(set_to_none=True)
    elif stage in (1, 2):
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for index in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer.overflow = False
    else:
        optimizer.zero_grad(set_to_none=True)  # counts micro-steps from 0, so that the next one overwrites
        optimizer.averaged_gradients = {}
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
            optimizer._offload_boundary_param_ids = set()
        optimizer.overflow = False
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def read_counters(engine: Any) -> dict[str, int]:
    """DeepSpeed's own counts: optimizer steps, samples, and steps that it skipped."""
    names = ("global_steps", "global_samples", "skipped_steps")
    return {name: int(getattr(engine, name)) for name in names}


def write_counters(engine: Any, counters: dict[str, int]) -> None:
    """Put back what `read_counters` gave; the next forward pass begins an optimizer step."""
    for name, value in counters.items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _groups(engine: Any, share: int, shares: int) -> Iterator[_Group]:
    """The flat tensors of this rank's optimizer. share, shares: the part to take of what is replicated."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for index, (parameter, name) in enumerate(names.items()):
            each = -(-parameter.numel() // shares)
            start, stop = (min(i * each, parameter.numel()) for i in (share, share + 1))
            yield _Group(parameter, [_Piece(name, parameter, start, stop, start)], index)
    elif stage in (1, 2):
        for index, parameters in enumerate(optimizer.bit16_groups):
            pieces = []
            for parameter in parameters:
                if (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    stop = here.start + here.numel
                    pieces.append(_Piece(names[parameter], parameter, here.start, stop, there.start))
            yield _Group(optimizer.single_partition_of_fp32_groups[index], pieces, index)
    else:
        for index, parameters in enumerate(optimizer.fp16_groups):
            pieces, offset = [], 0
            for parameter in parameters:
                length = parameter.partition_numel()
                begin = length * optimizer._get_param_partition_rank(parameter)
                start, stop = (min(place, parameter.ds_numel) for place in (begin, begin + length))
                pieces.append(_Piece(names[parameter], parameter, start, stop, offset))
                offset += length
            yield _Group(optimizer.fp32_partitioned_groups_flat[index], pieces, index)


@contextlib.contextmanager
def _in_memory(engine: Any, group: _Group, write: bool) -> Iterator[None]:
    """Hold a group's tensors in memory: under NVMe offload they are read in, and written back if need be."""
    optimizer = engine.optimizer
    swapped = engine.zero_optimization_stage() == 3 and optimizer._swappable_optimizer_subgroup(group.index)
    if not swapped:
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(group.index)
    created = not optimizer.optimizer.state[group.flat]
    yield
    if write or created:
        optimizer._optimizer_states_and_gradient_swap_out(group.index)
    else:
        optimizer._release_swap_buffers(group.index)


def _adam_state(engine: Any, flat: Tensor) -> dict[str, Any]:
    """Adam's state of a flat tensor; before the first step it is made as the optimizer would make it."""
    inner = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    state: dict[str, Any] = inner.state[flat]
    if not state:
        is_torch = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
        # torch counts in a tensor, DeepSpeed's Adam for the CPU in an int.
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device) if is_torch else 0
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format).requires_grad_(False)
    return state


def _set_step(state: dict[str, Any], step: float) -> None:
    if torch.is_tensor(state["step"]):
        state["step"].fill_(step)
    else:
        state["step"] = int(step)


def _local_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def _shard(parameter: Any, layout: Layout) -> Shard | None:
    if layout.tensor == 1 or not is_sharded(parameter):
        return None
    return Shard(layout.tensor_rank, layout.tensor, int(parameter.partition_dim))


def parameter_count(engine: Any, layout: Layout) -> int:
    """Elements of the whole model's parameters."""
    count = 0
    for parameter in engine.module.parameters():
        local = math.prod(_local_shape(parameter))
        count += local * (layout.tensor if _shard(parameter, layout) else 1)
    return count
