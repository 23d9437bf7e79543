"""relu(x)^2 and sigmoid(gate) * x on CPU: `cpu.cpp` bound with ctypes, registered as torch operators."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale.kernels.cpu import load_for, pointer

_POINTERS = {"squared_relu": 2, "squared_relu_grad": 3, "sigmoid_gate": 3, "sigmoid_gate_grad": 5}


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The kernels compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    for name, count in _POINTERS.items():
        for suffix in ("f32", "bf16"):
            function = getattr(lib, f"{name}_{suffix}")
            function.argtypes = [*[ctypes.c_void_p] * count, ctypes.c_int64, ctypes.c_int32]
            function.restype = None
    return lib


def _call(name: str, backend: str, *tensors: Tensor) -> None:
    suffix = "bf16" if tensors[0].dtype == torch.bfloat16 else "f32"
    function = getattr(library(backend), f"{name}_{suffix}")
    function(*(pointer(tensor) for tensor in tensors), tensors[0].numel(), torch.get_num_threads())


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def squared_relu_cpu(x: Tensor, backend: str) -> Tensor:
    """As `squared_relu`, for a CPU tensor in float32 or bfloat16."""
    return squared_relu_forward(x, backend)


def sigmoid_gate_cpu(gate: Tensor, x: Tensor, backend: str) -> Tensor:
    """As `sigmoid_gate`, for CPU tensors of one dtype, float32 or bfloat16."""
    return sigmoid_gate_forward(gate, x, backend)


@torch.library.custom_op("spikescale::squared_relu_forward", mutates_args=(), device_types="cpu")
def squared_relu_forward(x: Tensor, backend: str) -> Tensor:
    """relu(x)^2."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _call("squared_relu", backend, x, y)
    return y


@torch.library.custom_op("spikescale::squared_relu_backward", mutates_args=(), device_types="cpu")
def squared_relu_backward(x: Tensor, grad: Tensor, backend: str) -> Tensor:
    """grad * 2 relu(x)."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    _call("squared_relu_grad", backend, x, grad, grad_x)
    return grad_x


@torch.library.custom_op("spikescale::sigmoid_gate_forward", mutates_args=(), device_types="cpu")
def sigmoid_gate_forward(gate: Tensor, x: Tensor, backend: str) -> Tensor:
    """sigmoid(gate) * x."""
    gate, x = gate.contiguous(), x.contiguous()
    y = torch.empty_like(x)
    _call("sigmoid_gate", backend, gate, x, y)
    return y


@torch.library.custom_op("spikescale::sigmoid_gate_backward", mutates_args=(), device_types="cpu")
def sigmoid_gate_backward(gate: Tensor, x: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x."""
    gate, x, grad = gate.contiguous(), x.contiguous(), grad.contiguous()
    grad_gate, grad_x = torch.empty_like(gate), torch.empty_like(x)
    _call("sigmoid_gate_grad", backend, gate, x, grad, grad_gate, grad_x)
    return grad_gate, grad_x


@squared_relu_forward.register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return _like(x)


@squared_relu_backward.register_fake
def _(x: Tensor, grad: Tensor, backend: str) -> Tensor:
    return _like(x)


@sigmoid_gate_forward.register_fake
def _(gate: Tensor, x: Tensor, backend: str) -> Tensor:
    return _like(x)


@sigmoid_gate_backward.register_fake
def _(gate: Tensor, x: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _like(gate), _like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _squared_relu_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return squared_relu_backward(x, grad, ctx.backend), None


def _sigmoid_gate_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, x = ctx.saved_tensors
    return *sigmoid_gate_backward(gate, x, grad, ctx.backend), None


squared_relu_forward.register_autograd(_squared_relu_grad, setup_context=_save)
sigmoid_gate_forward.register_autograd(_sigmoid_gate_grad, setup_context=_save)
