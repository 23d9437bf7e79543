"""Elementwise functions of the channel mix, each one pass forward and one backward."""

import torch
from torch import Tensor

from spikescale.kernels.activations.reference import sigmoid_gate_reference, squared_relu_reference
from spikescale.kernels.backend import choose_backend

__all__ = ["sigmoid_gate", "squared_relu"]


def squared_relu(x: Tensor, backend: str = "auto") -> Tensor:
    """relu(x)^2, SpikeGPT's activation of the channel mix; its derivative is 2 relu(x).

    Args:
        x: any shape, float32, bfloat16, float16 or float64; computed in at least float32.
        backend: see `spikescale.kernels.backend`.

    Returns:
        A contiguous tensor of x's shape and dtype. A NaN stays a NaN.

    Raises:
        UserError: the backend is unknown, or cannot serve the tensor.
    """
    chosen = choose_backend("activations", backend, x.device.type, x.dtype)
    if chosen == "reference":
        return squared_relu_reference(x)
    if chosen == "triton":
        from spikescale.kernels.activations.triton import squared_relu_triton

        return squared_relu_triton(x)
    from spikescale.kernels.activations.cpu import squared_relu_cpu

    return squared_relu_cpu(x, chosen)


def sigmoid_gate(gate: Tensor, x: Tensor, backend: str = "auto") -> Tensor:
    """sigmoid(gate) * x, the receptance of the channel mix (SpikeGPT Sec. 3.5).

    Args:
        gate, x: the same shape, float32, bfloat16, float16 or float64; computed in at least float32.
        backend: see `spikescale.kernels.backend`.

    Returns:
        A contiguous tensor of the same shape in x's dtype.

    Raises:
        UserError: the backend is unknown, or cannot serve the tensors.
        ValueError: the shapes differ.
    """
    if gate.shape != x.shape:
        raise ValueError(f"gate and x must have one shape, not {tuple(gate.shape)} and {tuple(x.shape)}")
    dtype = torch.promote_types(gate.dtype, x.dtype)
    chosen = choose_backend("activations", backend, x.device.type, dtype)
    if chosen == "reference":
        return sigmoid_gate_reference(gate, x)
    if chosen == "triton":
        from spikescale.kernels.activations.triton import sigmoid_gate_triton

        return sigmoid_gate_triton(gate.to(dtype), x.to(dtype)).to(x.dtype)
    from spikescale.kernels.activations.cpu import sigmoid_gate_cpu

    return sigmoid_gate_cpu(gate.to(dtype), x.to(dtype), chosen).to(x.dtype)
