"""Every operator run on a small input, forward and backward: what `spikescale doctor` compares."""

from collections.abc import Callable

import torch
from torch import Tensor

from spikescale.kernels.activations import sigmoid_gate, squared_relu
from spikescale.kernels.layer_norm import layer_norm
from spikescale.kernels.lif import lif
from spikescale.kernels.lif_norm import lif_residual_norm
from spikescale.kernels.spike_bits import pack_spikes, unpack_spikes
from spikescale.kernels.token_mix import token_mix
from spikescale.kernels.wkv import wkv

# Called with the backend, w, u (C,) and k, v (B, T, C); the outputs.
_OPERATORS: dict[str, Callable[[str, Tensor, Tensor, Tensor, Tensor], list[Tensor]]] = {
    "wkv": lambda on, w, u, k, v: list(wkv(w, u, k, v, gate=k, backend=on))[:1],
    "lif": lambda on, w, u, k, v: list(lif(2 * k, backend=on)),
    "token_mix": lambda on, w, u, k, v: token_mix(k, [w, u], backend=on),
    "activations": lambda on, w, u, k, v: [squared_relu(k, on), sigmoid_gate(k, v, on)],
    "layer_norm": lambda on, w, u, k, v: [layer_norm(k, w, u, backend=on)],
    "lif_norm": lambda on, w, u, k, v: [
        x for x in lif_residual_norm(v, 2 * k, None, w, u, dropout=0.1, backend=on) if x is not None
    ],
    "spike_bits": lambda on, w, u, k, v: [_there_and_back((k > 0).float(), on)],
}
OPERATORS = (*_OPERATORS, "decode")


def run(operator: str, backend: str, device: str) -> list[Tensor]:
    """Outputs of an operator of OPERATORS, and the gradients of its inputs, float32 on the CPU.

    The inputs are the same for every backend. Raises UserError where the backend cannot be used.
    """
    if operator == "decode":
        return _decoded(backend)
    generator = torch.Generator().manual_seed(0)
    inputs = [-torch.rand(8, generator=generator), torch.rand(8, generator=generator)]
    inputs += torch.randn(2, 2, 16, 8, generator=generator)
    leaves = [x.to(device).requires_grad_() for x in inputs]
    outputs = _OPERATORS[operator](backend, *leaves)
    grads: tuple[Tensor, ...] = ()
    if outputs[0].requires_grad:
        weights = [torch.randn(out.shape, generator=generator).to(device) for out in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
    return [x.detach().cpu() for x in (*outputs, *grads)]


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any element, as a share of the largest number if that is above 1."""
    return max(
        float((a - e).abs().max() / e.abs().max().clamp_min(1.0))
        for a, e in zip(actual, expected, strict=True)
    )


def _there_and_back(spikes: Tensor, backend: str) -> Tensor:
    bits = pack_spikes(spikes, backend)
    assert bits is not None
    return unpack_spikes(bits, spikes.shape, spikes.dtype, backend)


def _decoded(backend: str) -> list[Tensor]:
    from spikescale.config import ModelConfig
    from spikescale.inference.decoder import Decoder
    from spikescale.model import SpikeGPT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SpikeGPT(ModelConfig(layers=1, width=8, vocab_size=16, backend="reference")).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # As initialised, projections are zeros.
                if parameter.dim() == 2:
                    parameter.normal_()
    decoder = Decoder(model, backend=backend)
    return [decoder.step(torch.tensor([token, 15 - token])) for token in range(4)]
