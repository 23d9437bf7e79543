"""LIF on GPUs: launches of the Triton kernels, registered as torch operators.

`spikescale::lif_triton_forward` and `spikescale::lif_triton_backward` have fake implementations and an
autograd formula, so `torch.compile` and activation checkpointing treat them like any torch operator. Kept
for backward are x, the spikes as bits, and the membrane before every block of 32 tokens.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikescale.errors import UserError
from spikescale.kernels import gpu
from spikescale.kernels.lif import triton_parallel as parallel
from spikescale.kernels.lif import triton_sequential as sequential
from spikescale.kernels.masks import as_bytes

__all__ = ["Form", "choose_form", "lif_triton", "warm_up"]

FORMS = ("auto", "sequential", "parallel")
BLOCK_TOKENS = sequential.TOKENS.value
BLOCK_CHANNELS = 64

# The model of `choose_form`; times are in tokens that a program walks.
RESIDENT = 4
LAUNCH = 100
LOADING_ENDS = 25


class Form(NamedTuple):
    """How time is walked: "sequential", or "parallel" over chunks of `chunk` tokens (0 if sequential)."""

    name: str
    chunk: int


def lif_triton(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    form: str = "auto",
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """`lif` for GPU tensors: shapes and meaning as there; x float32, bfloat16 or float16, v float32.

    Args:
        form: "sequential": a program walks all tokens of 64 channels; "parallel": chunks of time run side by
            side, with the same spikes and membranes bit for bit, and gradients equal to rounding;
            "auto": `choose_form`.
        chunk: tokens of a chunk of the parallel form, a multiple of 32; 0: what the model says.

    Raises:
        UserError: the form is unknown, or the chunk is no multiple of 32.
    """
    if form not in FORMS:
        raise UserError(f"form {form!r} of lif: unknown; there are {', '.join(FORMS)}")
    if chunk < 0 or chunk % BLOCK_TOKENS:
        raise UserError(f"chunk {chunk} of lif: must be a multiple of {BLOCK_TOKENS}, or 0")
    tau_tensor, tau_value = number_or_vector(tau)
    threshold_tensor, threshold_value = number_or_vector(v_threshold)
    inputs = (x, v, tau_tensor, threshold_tensor)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    neuron = (tau_value, threshold_value, v_reset, soft_reset, detach_reset, surrogate_alpha)
    spikes, v_out, _, _ = lif_triton_forward(
        x, v, reset, tau_tensor, threshold_tensor, *neuron, form, chunk, save
    )
    return spikes, v_out


def choose_form(
    batch: int,
    length: int,
    channels: int,
    multiprocessors: int = gpu.MULTIPROCESSORS,
    tau: float | None = 2.0,
    form: str = "auto",
) -> Form:
    """The faster form, and its chunk, by a model of the tokens that are walked one after another.

        sequential    load(P) T
        parallel      load(P N) (L + W)  +  2 LAUNCH  +  ceil(N / 8) LOADING_ENDS

    P programs of 64 channels of one row, N chunks of L tokens, W tokens of `warm_up`. A multiprocessor runs
    RESIDENT programs in the time of one, whose steps wait for each other; further ones compete for the
    memory's bandwidth: load(P) = max(1, P / (RESIDENT multiprocessors)). The parallel form costs two more
    launches, and the ends of the chunks are read eight at a time. The model assumes that the chunks merge
    within the warm-up: an input for which they do not costs the sequential time besides.

    `tau` None is one tau a channel; `form` other than "auto" only chooses the chunk.
    """
    programs = batch * -(-channels // BLOCK_CHANNELS)

    def load(programs: int) -> float:
        return max(1.0, programs / (RESIDENT * multiprocessors))

    def parallel_cost(chunk: int) -> float:
        chunks = -(-length // chunk)
        ends = 2 * LAUNCH + -(-chunks // parallel.AHEAD.value) * LOADING_ENDS
        return load(programs * chunks) * (min(chunk, length) + warm_up(tau)) + ends

    chunks = [BLOCK_TOKENS * 2**i for i in range(1, 11)]
    best = min((chunk for chunk in chunks if chunk < 2 * length or chunk == chunks[0]), key=parallel_cost)
    if form == "sequential" or (form == "auto" and load(programs) * length <= parallel_cost(best)):
        return Form("sequential", 0)
    return Form("parallel", best)


def warm_up(tau: float | None) -> int:
    """Tokens that a chunk starts early, a multiple of 32; they decide the time, never the result.

    A difference of membranes shrinks by 1 - 1 / tau a token. After as many tokens as make it 2^-24 of what it
    was, the precision of float32, one or two roundings are left of it, and a program has to run a chunk again
    if they are in one of its 64 channels; as many once more remove them: 64 tokens for tau 2, 128 for 4.
    `tau` None is one tau a channel, not known here: 96.
    """
    if tau is None:
        return 3 * BLOCK_TOKENS
    if tau <= 1:
        return BLOCK_TOKENS
    return BLOCK_TOKENS * math.ceil(48 * math.log(2) / -math.log1p(-1 / tau) / BLOCK_TOKENS)


def number_or_vector(value: float | Tensor) -> tuple[Tensor | None, float]:
    """A parameter as an operator takes it: one a channel, or a number."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))


def _blocks(length: int) -> int:
    return -(-length // BLOCK_TOKENS)


def _chunk(x: Tensor, tau: Tensor | None, tau_value: float, form: str, chunk: int) -> int:
    """Tokens of a chunk of the parallel form, or 0 where time is walked sequentially."""
    batch, length, channels = x.shape
    known_tau = tau_value if tau is None else None
    chosen = choose_form(batch, length, channels, gpu.multiprocessors(x.device), known_tau, form)
    return (chunk or chosen.chunk) if chosen.name == "parallel" else 0


def launch(kernel: Any, x: Tensor, axis1: int, *args: Any, **constants: Any) -> None:
    """Runs `kernel` on x's device: for every row and block of channels, and `axis1` times along time."""
    grid = (x.shape[0] * -(-x.shape[2] // BLOCK_CHANNELS), axis1)
    with gpu.on_device(x):
        kernel[grid](
            *args,
            **constants,
            BLOCK_C=BLOCK_CHANNELS,
            # One channel a lane: the backward kernels hold some seventy float32 a channel.
            num_warps=gpu.warps(BLOCK_CHANNELS),
            enable_fp_fusion=False,
        )


def divisor(tau: Tensor | None, tau_value: float) -> tuple[float, bool]:
    """What kernels take for tau, and whether it is the inverse: a product with a power of two is exact."""
    exact = tau is None and math.frexp(tau_value)[0] == 0.5
    return (1 / tau_value if exact else tau_value), exact


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("spikescale::lif_triton_forward", mutates_args=())
def lif_triton_forward(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: Tensor | None,
    v_threshold: Tensor | None,
    tau_value: float,
    threshold_value: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    form: str,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(spikes, final v, membrane before each block, spikes as bits); the last two are empty unless `save`.

    The numbers stand for tensors that are None; form and chunk as for `lif_triton`.
    """
    chunk = _chunk(x, tau, tau_value, form, chunk)
    batch, length, channels = x.shape
    v, reset = v.contiguous(), as_bytes(reset)
    tau, v_threshold = _contiguous(tau, v_threshold)
    spikes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    v_out = torch.empty_like(v)
    starts = v.new_empty((batch, _blocks(length), channels) if save or chunk else (0,))
    bits = torch.empty(
        (batch, _blocks(length), channels) if save else (0,), dtype=torch.int32, device=x.device
    )
    tau_value, inverse = divisor(tau, tau_value)
    sizes = (length, channels, *x.stride(), tau_value, threshold_value)
    constants = {
        "V_RESET": v_reset,
        "SOFT_RESET": soft_reset,
        "INVERSE_TAU": inverse,
        "WHOLE": length % BLOCK_TOKENS == 0,
    }
    kept_bits = bits if save else None
    if not chunk:
        launch(
            sequential.forward_kernel, x, 1,
            x, v, reset, tau, v_threshold, spikes, v_out, starts if save else None, kept_bits, *sizes,
            **constants,
        )  # fmt: skip
        return spikes, v_out, starts, bits
    chunks, per_chunk = -(-length // chunk), chunk // BLOCK_TOKENS
    early = warm_up(None if tau is not None else (1 / tau_value if inverse else tau_value)) // BLOCK_TOKENS
    ends = v.new_empty(batch, chunks, channels)
    launch(
        parallel.chunk_forward_kernel, x, chunks,
        x, v, reset, tau, v_threshold, spikes, starts, ends, kept_bits, *sizes, per_chunk, early,
        **constants,
    )  # fmt: skip
    launch(
        parallel.fix_up_kernel, x, 1,
        x, reset, tau, v_threshold, spikes, v_out, starts, ends, kept_bits, *sizes, chunks, per_chunk,
        **constants,
    )  # fmt: skip
    return spikes, v_out, starts if save else v.new_empty(0), bits


@lif_triton_forward.register_fake
def _(
    x: Tensor,
    v: Tensor,
    reset: Tensor | None,
    tau: Tensor | None,
    v_threshold: Tensor | None,
    tau_value: float,
    threshold_value: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    form: str,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    spikes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    v_out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kept = (batch, _blocks(length), channels) if save else (0,)
    return spikes, v_out, v.new_empty(kept), v.new_empty(kept, dtype=torch.int32)


@torch.library.custom_op("spikescale::lif_triton_backward", mutates_args=())
def lif_triton_backward(
    x: Tensor,
    reset: Tensor | None,
    tau: Tensor | None,
    v_threshold: Tensor | None,
    starts: Tensor,
    bits: Tensor,
    grad_spikes: Tensor,
    grad_v_out: Tensor | None,
    tau_value: float,
    threshold_value: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    form: str,
    chunk: int,
    tau_grad: bool,
    threshold_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), v, tau, v_threshold (float32; the last two empty if not asked for)."""
    chunk = _chunk(x, tau, tau_value, form, chunk)
    batch, length, channels = x.shape
    tau, v_threshold, grad_v_out = _contiguous(tau, v_threshold, grad_v_out)
    reset = as_bytes(reset)
    chunks = -(-length // chunk) if chunk else 1
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_v = starts.new_empty(batch, channels)
    # Every program sums over its own tokens, so that the result does not depend on who comes first.
    grad_tau = starts.new_empty(batch, chunks, channels) if tau_grad else None
    grad_threshold = starts.new_empty(batch, chunks, channels) if threshold_grad else None
    over, inverse = divisor(tau, tau_value)
    kept = (x, reset, tau, v_threshold, starts, bits, grad_spikes)
    strides = (*x.stride(), *grad_spikes.stride())
    sizes = (length, channels, *strides, over, threshold_value, surrogate_alpha)
    constants = {
        "V_RESET": v_reset,
        "SOFT_RESET": soft_reset,
        "DETACH_RESET": detach_reset,
        "INVERSE_TAU": inverse,
        "WHOLE": length % BLOCK_TOKENS == 0,
    }
    if not chunk:
        launch(
            sequential.backward_kernel, x, 1,
            *kept, grad_v_out, grad_x, grad_v, grad_tau, grad_threshold, *sizes, **constants,
        )  # fmt: skip
    else:
        per_chunk = chunk // BLOCK_TOKENS
        factors, terms, grads = (starts.new_empty(batch, chunks, channels) for _ in range(3))
        launch(parallel.adjoint_kernel, x, chunks, *kept, factors, terms, *sizes, per_chunk, **constants)
        launch(parallel.carry_kernel, x, 1, factors, terms, grad_v_out, grads, grad_v, channels, chunks)
        launch(
            parallel.chunk_backward_kernel, x, chunks,
            *kept, grads, grad_x, grad_tau, grad_threshold, *sizes, per_chunk, **constants,
        )  # fmt: skip
    return grad_x, grad_v, _summed(grad_tau, grad_v), _summed(grad_threshold, grad_v)


def _summed(parts: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if parts is None else parts.sum((0, 1))


@lif_triton_backward.register_fake
def _(
    x: Tensor,
    reset: Tensor | None,
    tau: Tensor | None,
    v_threshold: Tensor | None,
    starts: Tensor,
    bits: Tensor,
    grad_spikes: Tensor,
    grad_v_out: Tensor | None,
    tau_value: float,
    threshold_value: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    form: str,
    chunk: int,
    tau_grad: bool,
    threshold_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, channels = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_tau = starts.new_empty(channels if tau_grad else 0)
    grad_threshold = starts.new_empty(channels if threshold_grad else 0)
    return grad_x, starts.new_empty(batch, channels), grad_tau, grad_threshold


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, _, reset, tau, v_threshold = inputs[:5]
    _, _, starts, bits = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(starts, bits)
    ctx.save_for_backward(x, reset, tau, v_threshold, starts, bits)
    ctx.options = inputs[5:13]


def _backward(
    ctx: Any, grad_spikes: Tensor | None, grad_v_out: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x = ctx.saved_tensors[0]
    nothing = (None,) * 9
    if grad_spikes is None and grad_v_out is None:
        return None, None, None, None, None, *nothing
    if grad_spikes is None:
        grad_spikes = torch.zeros_like(x)
    tau_grad, threshold_grad = ctx.needs_input_grad[3:5]
    grad_x, grad_v, grad_tau, grad_threshold = lif_triton_backward(
        *ctx.saved_tensors, grad_spikes, grad_v_out, *ctx.options, tau_grad, threshold_grad
    )
    return (
        grad_x,
        grad_v,
        None,
        grad_tau if tau_grad else None,
        grad_threshold if threshold_grad else None,
        *nothing,
    )


lif_triton_forward.register_autograd(_backward, setup_context=_setup_context)
