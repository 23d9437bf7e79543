"""Token shift and its mixtures on GPUs: one Triton kernel forward and one backward.

`spikescale::token_mix_triton` and `spikescale::token_mix_triton_backward` have fake implementations and an
autograd formula, so `torch.compile` and activation checkpointing treat them like any torch operator.

A program walks CHUNK tokens of a sequence over a block of channels and keeps the token beside in registers,
so every token is read once, but for one at the chunk's edge. A group of tokens is loaded before the first of
them is stored, as the compiler would not move loads over stores.
"""

# Triton knows tuples and their sums, but no unpacking, and the names of a kernel have its types.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikescale.kernels import gpu
from spikescale.kernels.masks import as_bytes

CHUNK = 32  # tokens of one program
FORWARD_GROUP = 4  # tokens whose loads are in flight together
BACKWARD_GROUP = 2  # fewer, as each brings a gradient for every mixture: 4 would take 128 registers
MAX_BLOCK = 256  # channels of one program: 4 a thread


@triton.jit
def token_mix_forward_kernel(
    x,
    mus,
    last,
    reset,
    outputs,
    x_batch,
    x_time,
    length,
    channels,
    HAS_RESET: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, start, c, inside = _place(length, channels, CHUNK, BLOCK)
    x += batch * x_batch + c
    row = batch * length
    mixes = ()
    for n in tl.static_range(len(mus)):
        mixes = mixes + (tl.load(mus[n] + c, mask=inside),)
    if start == 0:
        previous = tl.load(last + batch * channels + c, mask=inside)
    else:
        previous = tl.load(x + (start - 1) * x_time, mask=inside).to(tl.float32)
    for first in range(start, tl.minimum(start + CHUNK, length), GROUP):
        values = ()
        for i in tl.static_range(GROUP):
            t = first + i
            values = values + (tl.load(x + t * x_time, mask=_when(t < length, inside)).to(tl.float32),)
        for i in tl.static_range(GROUP):
            t = first + i
            if HAS_RESET:
                starts = tl.load(reset + row + t, mask=t < length, other=0) != 0
                previous = tl.where(starts, 0.0, previous)
            for n in tl.static_range(len(mus)):
                mixed = previous + mixes[n] * (values[i] - previous)
                out = outputs[n] + (row + t) * channels + c
                tl.store(out, mixed.to(outputs[n].dtype.element_ty), mask=_when(t < length, inside))
            previous = values[i]


@triton.jit
def token_mix_backward_kernel(
    x,
    mus,
    last,
    reset,
    grads,
    grad_x,
    grad_mus,
    grad_last,
    x_batch,
    x_time,
    length,
    channels,
    HAS_RESET: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # From the chunk's end to its start: `value` is the token itself, `through` the gradient that reaches it
    # through 1 - mu of the token after it.
    batch, start, c, inside = _place(length, channels, CHUNK, BLOCK)
    x += batch * x_batch + c
    row = batch * length
    groups = tl.cdiv(tl.minimum(CHUNK, length - start), GROUP)
    after = start + groups * GROUP
    mixes = ()
    sums = ()
    through = tl.zeros([BLOCK], tl.float32)
    for n in tl.static_range(len(mus)):
        mixes = mixes + (tl.load(mus[n] + c, mask=inside),)
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
        part = tl.load(grads[n] + (row + after) * channels + c, mask=_when(after < length, inside), other=0.0)
        through += (1.0 - mixes[n]) * part.to(tl.float32)
    if HAS_RESET:
        starts = tl.load(reset + row + after, mask=after < length, other=0) != 0
        through = tl.where(starts, 0.0, through)
    value = tl.load(x + (after - 1) * x_time, mask=_when(after <= length, inside), other=0.0).to(tl.float32)
    for group in range(groups):
        top = after - 1 - group * GROUP
        befores = ()
        given = ()
        for i in tl.static_range(GROUP):
            t = top - i
            part = tl.load(x + (t - 1) * x_time, mask=_when((t > 0) & (t <= length), inside), other=0.0)
            befores = befores + (part.to(tl.float32),)
            of_token = ()
            for n in tl.static_range(len(mus)):
                # Zero for a token after the end: it adds nothing to the sums.
                part = tl.load(grads[n] + (row + t) * channels + c, mask=_when(t < length, inside), other=0.0)
                of_token = of_token + (part.to(tl.float32),)
            given = given + (of_token,)
        for i in tl.static_range(GROUP):
            t = top - i
            before = befores[i]
            previous = before
            if i == GROUP - 1:
                previous += tl.load(last + batch * channels + c, mask=_when(t == 0, inside), other=0.0)
            if HAS_RESET:
                starts = tl.load(reset + row + t, mask=t < length, other=0) != 0
                previous = tl.where(starts, 0.0, previous)
            own = tl.zeros([BLOCK], tl.float32)
            next_through = tl.zeros([BLOCK], tl.float32)
            next_sums = ()
            for n in tl.static_range(len(mus)):
                grad = given[i][n]
                next_sums = next_sums + (sums[n] + grad * (value - previous),)
                own += mixes[n] * grad
                next_through += (1.0 - mixes[n]) * grad
            sums = next_sums
            out = grad_x + (row + t) * channels + c
            tl.store(out, (own + through).to(grad_x.dtype.element_ty), mask=_when(t < length, inside))
            through = tl.where(starts, 0.0, next_through) if HAS_RESET else next_through
            value = before
    if start == 0:
        tl.store(grad_last + batch * channels + c, through, mask=inside)
    chunk = tl.program_id(0).to(tl.int64) // tl.cdiv(channels, BLOCK)
    for n in tl.static_range(len(mus)):
        tl.store(grad_mus + (chunk * len(mus) + n) * channels + c, sums[n], mask=inside)


@triton.jit
def _place(length, channels, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its sequence, first token and channels, and which of them exist."""
    blocks = tl.cdiv(channels, BLOCK)
    chunks = tl.cdiv(length, CHUNK)
    program = tl.program_id(0)
    part = program // blocks
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    # In 64 bits, as every offset of a large tensor follows from these.
    return (part // chunks).to(tl.int64), (part % chunks).to(tl.int64) * CHUNK, c, c < channels


@triton.jit
def _when(condition, mask):
    """`mask` if the scalar `condition` holds, else nothing: what the interpreter's & of the two is not."""
    return tl.where(condition, mask, False)


def token_mix_triton(
    x: Tensor, mus: list[Tensor], last: Tensor, reset: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """As `token_mix`, for float32, bfloat16 and float16 x on a GPU; mus and last in float32.

    The forward's results are the reference's, bit for bit. The mus' gradient is summed in a fixed order.
    """
    return token_mix_forward(x, mus, last, reset, dtype)


@torch.library.custom_op("spikescale::token_mix_triton", mutates_args=())
def token_mix_forward(
    x: Tensor, mus: Sequence[Tensor], last: Tensor, reset: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    x, last, reset = _adjacent_channels(x), last.contiguous(), as_bytes(reset)
    mus = [mu.contiguous() for mu in mus]
    outputs = _new_outputs(x, mus, dtype)
    # Unfused, the operations are the reference's.
    _launch(token_mix_forward_kernel, x, mus, last, reset, (tuple(outputs),), FORWARD_GROUP, fuse=False)
    return outputs


@torch.library.custom_op("spikescale::token_mix_triton_backward", mutates_args=())
def token_mix_backward(
    x: Tensor, mus: Sequence[Tensor], last: Tensor, reset: Tensor | None, grads: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), of the mus (N, C) and of last, in float32."""
    x, last, reset = _adjacent_channels(x), last.contiguous(), as_bytes(reset)
    mus, grads = [mu.contiguous() for mu in mus], [grad.contiguous() for grad in grads]
    batch, length, channels = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    # A row for every sequence and chunk, summed below: atomic additions would depend on their order.
    parts = x.new_empty(batch * triton.cdiv(length, CHUNK), len(mus), channels, dtype=torch.float32)
    grad_last = torch.empty_like(last)
    own = (tuple(grads), grad_x, parts, grad_last)
    _launch(token_mix_backward_kernel, x, mus, last, reset, own, BACKWARD_GROUP, fuse=True)
    return grad_x, parts.sum(0), grad_last


def _launch(
    kernel: Any,
    x: Tensor,
    mus: Sequence[Tensor],
    last: Tensor,
    reset: Tensor | None,
    own: tuple[Any, ...],
    group: int,
    fuse: bool,
) -> None:
    """Launch over chunks and blocks of channels; `own` are the arguments that the other kernel lacks."""
    batch, length, channels = x.shape
    if not x.numel():
        return
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(channels)))
    grid = (batch * triton.cdiv(length, CHUNK) * triton.cdiv(channels, block),)
    with gpu.on_device(x):
        kernel[grid](
            x,
            tuple(mus),
            last,
            reset,
            *own,
            x.stride(0),
            x.stride(1),
            length,
            channels,
            HAS_RESET=reset is not None,
            CHUNK=CHUNK,
            GROUP=group,
            BLOCK=block,
            num_warps=gpu.warps(block // 4),
            enable_fp_fusion=fuse,
        )


def _adjacent_channels(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _new_outputs(x: Tensor, mus: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=dtype, device=x.device) for _ in mus]


@token_mix_forward.register_fake
def _(
    x: Tensor, mus: Sequence[Tensor], last: Tensor, reset: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    return _new_outputs(x, mus, dtype)


@token_mix_backward.register_fake
def _(
    x: Tensor, mus: Sequence[Tensor], last: Tensor, reset: Tensor | None, grads: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, last.new_empty(len(mus), x.shape[2]), torch.empty_like(last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, mus, last, reset, dtype = inputs
    ctx.dtype = dtype
    ctx.save_for_backward(x, last, reset, *mus)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, last, reset, *mus = ctx.saved_tensors
    given = [torch.zeros(x.shape, dtype=ctx.dtype, device=x.device) if g is None else g for g in grads]
    grad_x, grad_mus, grad_last = token_mix_backward(x, mus, last, reset, given)
    return grad_x, list(grad_mus.unbind(0)), grad_last, None, None


token_mix_forward.register_autograd(_backward, setup_context=_setup_context)
