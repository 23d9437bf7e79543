"""`lif_residual_norm` on GPUs: the Triton kernels bound as torch operators.

`spikescale::lif_norm_triton` and `spikescale::lif_norm_triton_backward` have fake implementations and an
autograd formula, so `torch.compile` and activation checkpointing treat them like any torch operator.
"""

import functools
import logging
import math
from typing import Any

import torch
import triton
from torch import Tensor

from spikescale.kernels import gpu
from spikescale.kernels.backend import interpreting
from spikescale.kernels.lif_norm.reference import dropout_keep
from spikescale.kernels.lif_norm.triton_backward_kernels import carry_kernel, neuron_kernel, rows_kernel
from spikescale.kernels.lif_norm.triton_kernels import STRETCH, boundary_kernel, fix_up_kernel, forward_kernel
from spikescale.kernels.masks import as_bytes

MAX_CHANNELS = 2048  # a program holds whole rows, and more do not fit its registers
# Tokens. After 48 halvings two membranes are the same float32 number. After 32, one of 100 quiet neurons
# still differs in its last bit, so that of hundreds of channels there always is one to walk on for.
WARM_UP = 48
CHUNKS = (256, 128, 64, 32)  # tokens
PROGRAMS = 512
NEURON_LANES = 256  # channels of a program of backward's last launch, which needs no whole rows

logger = logging.getLogger("spikescale.kernels")


def lif_residual_norm_triton(
    x: Tensor,
    current: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tau: float | Tensor,
    v_threshold: float | Tensor,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    dropout: float,
    seed: int,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Shapes and meaning as for `lif_residual_norm`; x and v float32, current float32, bfloat16 or float16.

    The spikes and the membrane are the reference's bit for bit. With more than MAX_CHANNELS channels the
    parts run one after another.
    """
    if x.shape[2] > MAX_CHANNELS:
        _announce_parts(x.shape[2])
        neuron = (tau, v_threshold, v_reset, soft_reset, detach_reset, surrogate_alpha)
        return _in_parts(x, current, v, weight, bias, eps, neuron, dropout, seed, reset)
    taus, tau = (tau, 1.0) if isinstance(tau, Tensor) else (None, tau)
    thresholds, threshold = (v_threshold, 1.0) if isinstance(v_threshold, Tensor) else (None, v_threshold)
    x_out, normed, v_out, *_ = lif_norm_triton(
        x, current, v, weight, bias, taus, thresholds, reset, eps, tau, threshold, v_reset,
        soft_reset, detach_reset, surrogate_alpha, dropout, seed,
    )  # fmt: skip
    return x_out, None if weight is None else normed, v_out


def chunk_length(batch: int, length: int) -> int:
    """Tokens of a chunk: the most that still give PROGRAMS programs, or else the fewest there are.

    A chunk costs WARM_UP further tokens of reading and computing, which favours long ones; a GPU wants some
    programs for each of its 100 to 300 multiprocessors, which favours short ones.
    """
    for chunk in CHUNKS:
        if batch * triton.cdiv(length, chunk) >= PROGRAMS:
            return chunk
    return CHUNKS[-1]


def _program(threads: int) -> dict[str, int]:
    """Launch options of a program of so many threads, on the GPU at hand."""
    if interpreting():
        return {}
    warps = {"num_warps": gpu.warps(threads)}
    if triton.runtime.driver.active.get_current_target().backend == "cuda":
        # Without a bound ptxas spills some registers to fit one more program into a multiprocessor.
        warps["maxnreg"] = 65536 // max(threads, 512)
    return warps


@functools.cache
def _announce_parts(channels: int) -> None:
    logger.warning(
        "lif_norm: %d channels are more than the %d of the fused kernel: neurons, sum and norm run in parts",
        channels,
        MAX_CHANNELS,
    )


def _in_parts(
    x: Tensor,
    current: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    neuron: tuple[Any, ...],
    dropout: float,
    seed: int,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    from spikescale.kernels.layer_norm import layer_norm
    from spikescale.kernels.lif.triton import lif_triton

    spikes, v_out = lif_triton(current, v, reset, *neuron)
    x = x + spikes.to(x.dtype)
    if dropout:
        x = x * (dropout_keep(x.shape, dropout, seed, x.device) * (1 / (1 - dropout)))
    if weight is None or bias is None:
        return x, None, v_out
    return x, layer_norm(x, weight, bias, eps), v_out


def _neuron_arguments(tau: float, taus: Tensor | None, threshold: float, v_reset: float) -> dict[str, Any]:
    return {
        "tau": float(tau),
        "inverse_tau": 1 / tau,
        "v_threshold": float(threshold),
        "v_reset": float(v_reset),
        # Multiplied by the inverse of a power of two, a number rounds as if divided.
        "HALVING": taus is None and math.frexp(tau)[0] == 0.5,
    }


def _dropout_arguments(dropout: float, seed: int) -> dict[str, Any]:
    return {
        "seed_low": _as_int32(seed & 0xFFFFFFFF),
        "seed_high": _as_int32(seed >> 32),
        "drop_below": _as_int32(int(dropout * 2**32)),
        "scale": 1 / (1 - dropout),
        "DROPOUT": dropout > 0,
    }


def _as_int32(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("spikescale::lif_norm_triton", mutates_args=())
def lif_norm_triton(
    x: Tensor,
    current: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    taus: Tensor | None,
    thresholds: Tensor | None,
    reset: Tensor | None,
    eps: float,
    tau: float,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x', LayerNorm(x'), final v, v before every stretch, mean, 1 / standard deviation).

    The last three are what backward needs. `taus` and `thresholds` (C,) take precedence over the numbers.
    Without `weight` the LayerNorm and its statistics are empty.
    """
    inputs = _contiguous(x, current, v, weight, bias, taus, thresholds)
    x, current, v, weight, bias, taus, thresholds = inputs  # type: ignore[assignment]
    batch, length, channels = x.shape
    chunk = chunk_length(batch, length)
    chunks, lanes = triton.cdiv(length, chunk), triton.next_power_of_2(channels)
    x_out, normed, v_out, v_starts, mean, rstd = _outputs(x, v, weight)
    v_ends = x.new_empty(batch, chunks, channels)
    stream = (x, current)
    parameters = (as_bytes(reset), weight, bias, taus, thresholds)
    outputs = (x_out, normed, mean, rstd, v_starts, v_ends, v_out)
    options = {
        "T": length,
        "chunks": chunks,
        "eps": eps,
        "SOFT_RESET": soft_reset,
        **_neuron_arguments(tau, taus, threshold, v_reset),
        **_dropout_arguments(dropout, seed),
    }
    # Contraction of a product and a sum would round the membrane once where the reference rounds twice.
    layout = {"C": channels, "LANES": lanes, "CHUNK": chunk, "enable_fp_fusion": False}
    with gpu.on_device(x):
        forward_kernel[(batch * chunks,)](
            *stream,
            v,
            *parameters,
            *outputs,
            WARM_UP=WARM_UP,
            **_program(lanes // 2),
            **options,
            **layout,
        )
        if chunks > 1:
            suspect = torch.empty(batch, chunks, dtype=torch.int32, device=x.device)
            boundary_kernel[(batch * chunks,)](
                v_starts, v_ends, suspect, length, chunks, **_program(min(lanes // 2, 512)), **layout
            )
            boundaries = triton.next_power_of_2(chunks)
            fix_up_kernel[(batch,)](
                *stream,
                *parameters,
                *outputs,
                suspect,
                BOUNDARIES=boundaries,
                **_program(min(lanes // 2, 512)),
                **options,
                **layout,
            )
    return x_out, normed, v_out, v_starts, mean, rstd


def _outputs(x: Tensor, v: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    batch, length, channels = x.shape
    stretches = triton.cdiv(length, STRETCH.value)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if weight is not None else (0,)),
        v.new_empty(v.shape),
        x.new_empty(batch, stretches, channels),
        *(x.new_empty((batch, length) if weight is not None else (0,)) for _ in range(2)),
    )


@lif_norm_triton.register_fake
def _(
    x: Tensor, current: Tensor, v: Tensor, weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x, v, weight)  # type: ignore[return-value]


@torch.library.custom_op("spikescale::lif_norm_triton_backward", mutates_args=())
def lif_norm_triton_backward(
    current: Tensor,
    x_out: Tensor | None,
    weight: Tensor | None,
    taus: Tensor | None,
    thresholds: Tensor | None,
    reset: Tensor | None,
    v_starts: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x_out: Tensor | None,
    grad_normed: Tensor | None,
    grad_v_out: Tensor | None,
    tau: float,
    threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    surrogate_alpha: float,
    dropout: float,
    seed: int,
    with_tau: bool,
    with_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, current, v, weight, bias, taus and thresholds.

    Those of weight and bias are empty without `grad_normed`, those of taus and thresholds unless `with_tau`
    and `with_threshold`. Shares of the chunks are summed in float64.
    """
    inputs = _contiguous(current, x_out, weight, taus, thresholds, grad_x_out, grad_normed, grad_v_out)
    current, x_out, weight, taus, thresholds, grad_x_out, grad_normed, grad_v_out = inputs  # type: ignore[assignment]
    batch, length, channels = current.shape
    chunk = chunk_length(batch, length)
    chunks, lanes = triton.cdiv(length, chunk), triton.next_power_of_2(channels)
    grad_x, grad_current = v_starts.new_empty(current.shape), torch.empty_like(current)
    gains, offsets, carries = (v_starts.new_empty(batch, chunks, channels) for _ in range(3))
    wanted = (grad_normed is not None, grad_normed is not None, with_tau, with_threshold)
    shares = [torch.empty_like(gains) if want else None for want in wanted]
    byte_reset = as_bytes(reset)
    options = {
        "T": length,
        "chunks": chunks,
        "alpha": float(surrogate_alpha),
        "SOFT_RESET": soft_reset,
        "DETACH_RESET": detach_reset,
        **_neuron_arguments(tau, taus, threshold, v_reset),
        "C": channels,
        "CHUNK": chunk,
        # The membranes must be those of forward.
        "enable_fp_fusion": False,
    }
    with gpu.on_device(current):
        rows_kernel[(batch * chunks,)](
            current, byte_reset, x_out, weight, taus, thresholds, v_starts, mean, rstd,
            grad_x_out, grad_normed, grad_x, gains, offsets, shares[0], shares[1],
            LANES=lanes, **_program(min(lanes // 2, 512)), **options, **_dropout_arguments(dropout, seed),
        )  # fmt: skip
        grad_v = v_starts.new_empty(batch, channels)
        block = min(lanes, NEURON_LANES)
        blocks, program = triton.cdiv(channels, block), _program(block // 2)
        carry_kernel[(batch * blocks,)](
            gains, offsets, grad_v_out, carries, grad_v, chunks, C=channels, LANES=block,
            enable_fp_fusion=False, **program,
        )  # fmt: skip
        neuron_kernel[(batch * chunks * blocks,)](
            current, byte_reset, taus, thresholds, v_starts, carries, grad_x, grad_current,
            shares[2], shares[3], LANES=block, **program, **options,
        )  # fmt: skip
    sums = [_total(share, current) for share in shares]
    return grad_x, grad_current, grad_v, sums[0], sums[1], sums[2], sums[3]


def _total(shares: Tensor | None, like: Tensor) -> Tensor:
    if shares is None:
        return like.new_empty(0, dtype=torch.float32)
    return shares.sum((0, 1), dtype=torch.float64).float()


@lif_norm_triton_backward.register_fake
def _(
    current: Tensor,
    x_out: Tensor | None,
    weight: Tensor | None,
    taus: Tensor | None,
    thresholds: Tensor | None,
    reset: Tensor | None,
    v_starts: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x_out: Tensor | None,
    grad_normed: Tensor | None,
    grad_v_out: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, channels = current.shape
    wanted = (grad_normed is not None, grad_normed is not None, *rest[-2:])
    sums = [v_starts.new_empty(channels if want else 0) for want in wanted]
    grad_x, grad_current = v_starts.new_empty(current.shape), current.new_empty(current.shape)
    return grad_x, grad_current, v_starts.new_empty(batch, channels), sums[0], sums[1], sums[2], sums[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, current, _, weight, _, taus, thresholds, reset, _, *options = inputs
    x_out, _, _, v_starts, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(v_starts, mean, rstd)
    normalised = None if weight is None else x_out
    ctx.save_for_backward(current, normalised, weight, taus, thresholds, reset, v_starts, mean, rstd)
    ctx.options = options


def _backward(
    ctx: Any, grad_x_out: Tensor | None, grad_normed: Tensor | None, grad_v: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    current, x_out, weight, taus, thresholds, *saved = ctx.saved_tensors
    if weight is None:
        grad_normed = None
    if grad_x_out is None and grad_normed is None and grad_v is None:
        return (None,) * 17
    with_tau = taus is not None and ctx.needs_input_grad[5]
    with_threshold = thresholds is not None and ctx.needs_input_grad[6]
    inputs = (current, x_out, weight, taus, thresholds, *saved, grad_x_out, grad_normed, grad_v)
    gradients = lif_norm_triton_backward(*inputs, *ctx.options, with_tau, with_threshold)
    present = (True, True, True, grad_normed is not None, grad_normed is not None, with_tau, with_threshold)
    wanted = (gradient if there else None for gradient, there in zip(gradients, present, strict=True))
    return (*wanted, *(None,) * 10)


lif_norm_triton.register_autograd(_backward, setup_context=_setup_context)
