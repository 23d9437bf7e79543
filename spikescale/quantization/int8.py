"""Projections with eight-bit weights, computed by torchao.

What torchao calls `Int8Tensor` takes the place of a projection's weight: integers and a scale for each output
channel. All else of the model (vectors, WKV, neurons, the residual stream) stays float32.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spikescale.errors import UserError
from spikescale.model.channel_mix import ChannelMix
from spikescale.model.neuron import LIF
from spikescale.model.spikegpt import SpikeGPT
from spikescale.model.time_mix import TimeMix
from spikescale.quantization.settings import Quantization

SCALE = "_scale"  # ends the names of scales
EMBEDDING = "embedding.weight"
LARGEST = 127


def quantized_tensors(model: SpikeGPT) -> dict[str, Tensor]:
    """What a quantised model folder holds: int8 matrices with a float32 scale a row; all else float32.

    A binary embedding keeps only its signs, as 1 and -1, which is all that is read of it. Raises UserError
    for weights that are not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().cpu()
        if not bool(value.isfinite().all()):
            raise UserError(f"{name}: holds numbers that are not finite, which cannot be quantised")
        if value.dim() != 2:
            tensors[name] = value
        elif name == EMBEDDING and model.config.binary_embedding:
            tensors[name] = torch.where(value >= 0, 1, -1).to(torch.int8)
            tensors[name + SCALE] = torch.ones(len(value))
        else:
            stored = _int8_tensor(value)
            tensors[name], tensors[name + SCALE] = stored.qdata, stored.scale.flatten()
    return tensors


def apply_int8(model: SpikeGPT, tensors: Mapping[str, Tensor], quantization: Quantization) -> None:
    """Give a model the tensors that `quantized_tensors` made: its projections multiply eight-bit weights.

    The embedding's rows, of which each token reads one, become float32 again. Raises UserError where this
    processor's integer products are wrong.
    """
    _require_exact_products()
    parameters, spiking = dict(model.named_parameters()), reading_spikes(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            stored = tensors[name]
            if stored.dtype == torch.int8 and name == EMBEDDING:
                stored = stored.float() * tensors[name + SCALE][:, None]
            if stored.dtype != torch.int8:
                parameter.copy_(stored)
                continue
            place = name.removesuffix(".weight")
            weight = _from_stored(stored, tensors[name + SCALE], quantization, place in spiking)
            module = model.get_submodule(place)
            module.weight = nn.Parameter(weight, requires_grad=False)


def reading_spikes(model: SpikeGPT) -> set[str]:
    """Names of the projections behind neurons whose spikes are whole numbers that eight bits hold."""
    if model.config.neuron.levels > LARGEST:
        return set()
    found = {"head"} if isinstance(model.head_neuron, LIF) else set()
    for name, module in model.named_modules():
        if isinstance(module, TimeMix | ChannelMix):
            neurons = {key for key, neuron in module.neurons.items() if isinstance(neuron, LIF)}
            # The activation's neurons are those that W_v reads.
            keys = {"value" if key == "activation" else key for key in neurons}
            found |= {f"{name}.{key}" for key in keys}
    return found


def is_quantized(model: nn.Module) -> bool:
    """Whether any of its projections has eight-bit weights."""
    return any(hasattr(parameter, "qdata") for parameter in model.parameters())


def matrix_bytes(model: nn.Module) -> int:
    """Bytes of the projections' weights in memory, with their scales."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight: Any = module.weight
            parts = (weight.qdata, weight.scale) if hasattr(weight, "qdata") else (weight,)
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def _int8_tensor(weight: Tensor) -> Any:
    with _quiet():
        from torchao.quantization import Int8Tensor, PerRow
    return Int8Tensor.from_hp(weight, PerRow())


def _from_stored(qdata: Tensor, scale: Tensor, quantization: Quantization, spikes: bool) -> Any:
    with _quiet():
        from torchao.quantization import Int8Tensor, PerRow, PerTensor
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
    options: dict[str, Any] = {}
    if quantization.activations == "token":
        granularity = PerTensor() if spikes else PerRow()
        options["act_quant_kwargs"] = QuantizeTensorToInt8Kwargs(granularity=granularity)
        if spikes:
            # A scale of 1, and not the token's largest spike over 127.5, by which none would be a whole
            # number.
            options["act_quant_scale"] = torch.ones(1, 1, 1)
    return Int8Tensor(qdata, scale[:, None].float(), [1, qdata.shape[1]], torch.float32, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torchao's complaints, at its import, that kernels for GPUs cannot be loaded here.

    Raises UserError where torchao is not installed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UserError(f"eight-bit weights need torchao (pip install 'spikescale[int8]'): {error}") from None
    finally:
        logging.disable(before)


def _require_exact_products() -> None:
    """Integer products that saturate, as of processors without VNNI, would be wrong and look right."""
    a = torch.full((17, 64), -127, dtype=torch.int8)
    product = torch._int_mm(a, torch.full((64, 16), 127, dtype=torch.int8))
    if not bool((product == -127 * 127 * 64).all()):
        raise UserError("this processor's products of 8-bit integers saturate; use the float32 model here")
