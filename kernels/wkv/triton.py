"""WKV on a GPU: the Triton kernels launched and registered as torch operators.

`spikescale::wkv_triton_forward` and `spikescale::wkv_triton_backward` have fake implementations and an
autograd formula, so `torch.compile` and activation checkpointing treat them like any torch operator. Under
TRITON_INTERPRET=1, set before triton is imported, they take CPU tensors.

k, v, the gate and the gradient of y may have any strides over batch and time, as slices of one projection
do: kernels are given them, those over time as constants, which makes the addresses of a block of tokens one
address and constant offsets. Neighbouring channels must be adjacent in memory, or a copy is made: otherwise
every pass would read whole sectors of memory for single numbers.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from spikescale.kernels import gpu
from spikescale.kernels.masks import as_bytes
from spikescale.kernels.wkv.triton_chunked import wkv_carry, wkv_outputs, wkv_summaries
from spikescale.kernels.wkv.triton_chunked_backward import wkv_carry_back, wkv_gather, wkv_reverse
from spikescale.kernels.wkv.triton_plan import BACK_SUB, GROUP, SUB, choose_form
from spikescale.kernels.wkv.triton_sequential import wkv_sequential_backward, wkv_sequential_forward

__all__ = ["choose_form", "wkv_triton"]

# Warps of a program, a lane a channel. One spreads few programs most evenly, and keeps the compiler from
# spilling in the chunked backward; with two, a multiprocessor holds more of the small forward passes.
WARPS = 1
FORWARD_WARPS = 2


def wkv_triton(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    gate: Tensor | None = None,
    form: str = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`spikescale.kernels.wkv.wkv` in Triton, which see for the arguments; k, v and gate of one dtype.

    Args:
        form: "chunked", "sequential", or "auto": whichever `choose_form` says.
        chunk: tokens a chunk, a multiple of 8, for the chunked form; None: what `choose_form` says.

    Raises:
        ValueError: the form is unknown, or the chunk does not fit it.
    """
    batch, length, channels = k.shape
    inputs = (w, u, k, v, state) if gate is None else (w, u, k, v, state, gate)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if chunk is None:
        count = gpu.multiprocessors(k.device)
        gated = gate is not None
        chosen = choose_form(batch, length, channels, k.element_size(), count, gated, save, form)
        chunk = chosen.chunk
    elif form != "chunked" or chunk <= 0 or chunk % SUB:
        raise ValueError(f"chunk {chunk} of form {form!r}: give a multiple of {SUB} and the form 'chunked'")
    y, state_out, _ = wkv_triton_forward(w, u, k, v, state, reset, gate, chunk, save)
    return y, state_out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _strides(*tensors: Tensor | None) -> tuple[list[int], list[int]]:
    """Those over batch, and those over time; 0 for None."""
    return [0 if x is None else x.stride(0) for x in tensors], [
        0 if x is None else x.stride(1) for x in tensors
    ]


def _channel_block(channels: int, warps: int) -> tuple[int, int]:
    """Channels of a program, one a lane, and its warps; both no more than these channels need."""
    warp = gpu.warp_size()
    block = min(max(triton.next_power_of_2(channels), warp), 32 * max(warps, warp // 32))
    return block, block // warp


def _new_saved(k: Tensor, chunk: int, save: bool) -> Tensor:
    """What forward leaves for backward: the past before every chunk, or before every SUB-th token."""
    batch, length, channels = k.shape
    step = chunk or SUB
    shape = (batch, (length + step - 1) // step, 6, channels) if save else (0,)
    return k.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("spikescale::wkv_triton_forward", mutates_args=())
def wkv_triton_forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, saved); chunk 0 is the sequential form, and nothing is saved unless `save`."""
    w, u, state, k, v = w.contiguous(), u.contiguous(), state.contiguous(), _rows(k), _rows(v)
    gate, reset = None if gate is None else _rows(gate), as_bytes(reset)
    batch, length, channels = k.shape
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    state_out, saved = torch.empty_like(state), _new_saved(k, chunk, save)
    batch_strides, time_strides = _strides(k, v, gate)
    with gpu.on_device(k):
        if not chunk:
            block, warps = _channel_block(channels, WARPS)
            wkv_sequential_forward[(batch, triton.cdiv(channels, block))](
                w, u, k, v, gate, state, reset, y, state_out, saved if save else None,
                length, *batch_strides, channels, *time_strides, SUB, block, num_warps=warps,
            )  # fmt: skip
            return y, state_out, saved
        block, warps = _channel_block(channels, FORWARD_WARPS)
        blocks, chunks, rows = triton.cdiv(channels, block), triton.cdiv(length, chunk), 6 if save else 4
        starts = saved if save else k.new_empty((batch, chunks, rows, channels), dtype=torch.float32)
        summaries = torch.empty_like(starts)
        closed = None if reset is None else reset.new_empty((batch, chunks))
        if chunks > 1:
            wkv_summaries[(batch * (chunks - 1), blocks)](
                w, k, v, reset, summaries, closed,
                length, chunks, *batch_strides[:2], channels, *time_strides[:2],
                save, chunk, SUB, block, num_warps=warps,
            )  # fmt: skip
        carry_block, carry_warps = _channel_block(channels, WARPS)
        wkv_carry[(batch, triton.cdiv(channels, carry_block))](
            w, state, summaries, closed, starts, chunks, channels,
            save, chunk, GROUP, carry_block, num_warps=carry_warps,
        )  # fmt: skip
        wkv_outputs[(batch * chunks, blocks)](
            w, u, k, v, gate, reset, starts, y, state_out,
            length, chunks, *batch_strides, channels, *time_strides, rows, chunk, SUB, block, num_warps=warps,
        )  # fmt: skip
    return y, state_out, saved


@wkv_triton_forward.register_fake
def _(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    return y, torch.empty_like(state, memory_format=torch.contiguous_format), _new_saved(k, chunk, save)


@torch.library.custom_op("spikescale::wkv_triton_backward", mutates_args=())
def wkv_triton_backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    saved: Tensor,
    state_out: Tensor,
    grad_y: Tensor,
    grad_state_out: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w, u (float32), k, v (in their dtype), initial state (0 for m) and gate (or empty)."""
    w, u, k, v, grad_y = w.contiguous(), u.contiguous(), _rows(k), _rows(v), _rows(grad_y)
    gate, reset = None if gate is None else _rows(gate), as_bytes(reset)
    grad_state_out = None if grad_state_out is None else grad_state_out.contiguous()
    batch, length, channels = k.shape
    grad_k, grad_v, grad_gate = _new_grads(k, v, gate)
    grad_state = torch.empty_like(state_out)
    wanted_gate = None if gate is None else grad_gate
    batch_strides, time_strides = _strides(k, v, gate, grad_y)
    chunks = triton.cdiv(length, chunk) if chunk else 1
    partial = k.new_empty((batch, chunks, 2, channels), dtype=torch.float32)
    with gpu.on_device(k):
        block, warps = _channel_block(channels, WARPS)
        grid = (batch * chunks, triton.cdiv(channels, block))
        if not chunk:
            wkv_sequential_backward[grid](
                w, u, k, v, gate, reset, saved, state_out, grad_y, grad_state_out,
                grad_k, grad_v, wanted_gate, grad_state, partial,
                length, *batch_strides, channels, *time_strides, SUB, block, num_warps=warps,
            )  # fmt: skip
        else:
            marks = partial.new_empty((batch, triton.cdiv(length, BACK_SUB), 4, channels))
            summaries = partial.new_empty((batch, chunks, 6, channels))
            ends = partial.new_empty((batch, chunks, 5, channels))
            closed = None if reset is None else reset.new_empty((batch, chunks))
            wkv_gather[grid](
                w, u, k, v, gate, reset, saved, state_out, grad_y, grad_state_out,
                marks, summaries, closed, wanted_gate, partial,
                length, chunks, *batch_strides, channels, *time_strides,
                chunk, BACK_SUB, block, num_warps=warps,
            )  # fmt: skip
            wkv_carry_back[(batch, grid[1])](
                w, state_out, grad_state_out, summaries, closed, ends, length, chunks, channels,
                chunk, GROUP, block, num_warps=warps,
            )  # fmt: skip
            wkv_reverse[grid](
                w, u, k, v, gate, reset, saved, marks, ends, grad_y, grad_k, grad_v, grad_state,
                length, chunks, *batch_strides, channels, *time_strides,
                chunk, BACK_SUB, block, num_warps=warps,
            )  # fmt: skip
    # No atomics: the sum over sequences and chunks is the same in every run.
    grad_w, grad_u = partial.sum((0, 1), dtype=torch.float64).float()
    return grad_w.clone(), grad_u.clone(), grad_k, grad_v, grad_state, grad_gate


def _new_grads(k: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    return grad_k, grad_v, v.new_empty((0,)) if gate is None else torch.empty_like(grad_v)


@wkv_triton_backward.register_fake
def _(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    reset: Tensor | None,
    gate: Tensor | None,
    saved: Tensor,
    state_out: Tensor,
    grad_y: Tensor,
    grad_state_out: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(w),
        torch.empty_like(u),
        *_new_grads(k, v, None)[:2],
        torch.empty_like(state_out),
        (_new_grads(k, v, gate)[2]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, u, k, v, _, reset, gate, chunk, _ = inputs
    _, state_out, saved = output
    ctx.chunk = chunk
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(w, u, k, v, reset, gate, saved, state_out)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    if grad_y is None and grad_state is None:
        return (None,) * 9
    w, u, k, v, reset, gate, saved, state_out = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(v)
    *grads, grad_gate = wkv_triton_backward(
        w, u, k, v, reset, gate, saved, state_out, grad_y, grad_state, ctx.chunk
    )
    return *grads, None, None if gate is None else grad_gate, None, None


wkv_triton_forward.register_autograd(_backward, setup_context=_setup_context)
