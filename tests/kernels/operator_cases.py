"""Every operator of a model on small inputs, for tests of what holds for all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.layer_norm import layer_norm
from spikescale.kernels.lif import lif
from spikescale.kernels.lif_norm import lif_residual_norm
from spikescale.kernels.spike_bits import pack_spikes, unpack_spikes
from spikescale.kernels.token_mix import token_mix
from spikescale.kernels.wkv import initial_state, wkv

DIFFERENTIABLE = (
    "wkv",
    "lif",
    "lif_norm",
    "lif_norm in parts",
    "token_mix",
    "squared_relu",
    "sigmoid_gate",
    "layer_norm",
)


def make_case(
    name: str, batch: int, length: int, channels: int, device: str = "cpu"
) -> tuple[Callable[[str], list[Tensor]], dict[str, Tensor]]:
    """An operator as a function of the backend, and the leaves that it differentiates, by name."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    x, y, z = (normal(batch, length, channels) for _ in range(3))
    vectors = {name: normal(channels) for name in ("first", "second", "third", "fourth")}
    first, second, third, fourth = vectors.values()
    row = normal(batch, channels)
    reset = torch.zeros(batch, length, dtype=torch.bool, device=device)
    tensors = {"x": x, "y": y, "z": z, "row": row, **vectors}

    def run(backend: str) -> list[Tensor]:
        if name == "wkv":
            state = initial_state(batch, channels, device)
            return list(wkv(-first.exp(), second, x, y, state, reset, z, backend=backend))
        if name == "lif":
            tau, threshold = 2 + third.abs(), 1 + fourth.abs()
            return list(lif(x, row, tau=tau, v_threshold=threshold, reset=reset, backend=backend))
        if name.startswith("lif_norm"):
            inputs = (x, y, row, first, second)
            outputs = lif_residual_norm(*inputs, dropout=0.2, seed=3, reset=reset, backend=backend)
            return [output for output in outputs if output is not None]
        if name == "token_mix":
            return token_mix(x, [first, second], row, reset, backend=backend)
        if name == "squared_relu":
            return [squared_relu(x, backend)]
        if name == "sigmoid_gate":
            return [sigmoid_gate(x, y, backend)]
        if name == "layer_norm":
            return [layer_norm(x, first, second, backend=backend)]
        assert name == "spike_bits"
        spikes = (x > 0).float()
        bits = pack_spikes(spikes, backend)
        assert bits is not None
        return [unpack_spikes(bits, spikes.shape, spikes.dtype, backend)]

    return run, tensors
