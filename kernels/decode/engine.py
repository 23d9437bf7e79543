"""The decode engine: packed weights, the state of a batch, and a step of both."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spikescale.kernels.cpu import pointer
from spikescale.kernels.decode.cpu import (
    BFLOAT16,
    FLOAT32,
    NEURONS,
    WIDENED,
    Layer,
    LifOptions,
    Model,
    library,
)
from spikescale.kernels.decode.layout import packed_size, pad, padded, panels

# From this many rows on, bfloat16 weights are multiplied with activations rounded to bfloat16 where the CPU
# has instructions for that: below, memory decides the speed and rounding would be a loss without a gain.
BFLOAT16_ROWS = 8
# The field of Layer behind each entry of a block's state.
MEMBRANES = {
    "time_mix.key": "v_key",
    "time_mix.value": "v_value",
    "time_mix.receptance": "v_receptance",
    "time_mix.output": "v_output",
    "time_neuron": "v_time",
    "channel_mix.key": "v_channel_key",
    "channel_mix.receptance": "v_channel_receptance",
    "channel_mix.activation": "v_activation",
    "channel_mix.value": "v_channel_value",
    "channel_neuron": "v_channel",
}
SHIFTS = {"time_mix.shift": "shift", "channel_mix.shift": "channel_shift"}
EMPTY = -1e38  # exponent of a WKV state that has seen nothing


@dataclass(frozen=True)
class EngineConfig:
    """What the parameters do not tell. `neuron` stands after the sub-blocks; membranes elsewhere are found in
    the state. `stream_grid` is the spacing of the values that the first LayerNorm is rounded to; 0: none."""

    layers: int
    binary_embedding: bool
    neuron: Literal["none", "heaviside", "lif"]
    tau: float
    v_threshold: float
    v_reset: float
    soft_reset: bool
    eps: float
    stream_grid: float = 0.0


class Engine:
    """The parameters of a SpikeGPT, by name, packed once, and the state of a batch.

    Args:
        parameters: float32 CPU tensors by the model's parameter names. The embedding is used where it is, all
            else is copied.
        config: the rest of the model.
        backend: one of CPU_BACKENDS.
        dtype: of the matrices, float32 or bfloat16; all other parameters stay in float32.
        skip_zeros: whether a single row's zero activations leave their weights unread.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: EngineConfig,
        backend: str,
        dtype: torch.dtype = torch.float32,
        skip_zeros: bool = True,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.library = library(backend)
        self.embedding = parameters["embedding.weight"].detach().contiguous()
        self.vocabulary, self.width = self.embedding.shape
        self.inner = parameters["blocks.0.channel_mix.key.weight"].shape[0]
        # What the structures below point to. All matrices lie in one piece of memory, in the order of use,
        # asked for in large pages before it is first written to.
        names = [name for name, x in parameters.items() if x.dim() == 2 and name != "embedding.weight"]
        sizes = [packed_size(parameters[name].shape, dtype) for name in names]
        self.matrices = torch.empty(sum(sizes), dtype=dtype)
        self.library.decode_advise(pointer(self.matrices), self.matrix_bytes())
        self.filled = 0  # elements of `matrices`
        self.vectors: list[Tensor] = []
        self.decays: list[Tensor] = []
        self.layers = (Layer * config.layers)()
        for index, layer in enumerate(self.layers):
            self._fill_layer(layer, parameters, f"blocks.{index}.")
        lif = LifOptions(config.tau, config.v_threshold, config.v_reset, config.soft_reset)
        self.model = Model(
            layer_count=config.layers,
            width=self.width,
            inner=self.inner,
            vocabulary=self.vocabulary,
            layers=ctypes.addressof(self.layers),
            embedding=pointer(self.embedding),
            head=self._matrix(panels(parameters["head.weight"], dtype)),
            eps=config.eps,
            grid=config.stream_grid,
            binary_embedding=config.binary_embedding,
            neuron=NEURONS[config.neuron],
            skip_zeros=skip_zeros,
            lif=lif,
        )
        for field, name in (("ln0", "blocks.0.ln0"), ("ln_out", "ln_out")):
            for part in ("weight", "bias"):
                setattr(self.model, f"{field}_{part}", self._vector(parameters[f"{name}.{part}"]))
        self.batch = 0
        self.entries: list[dict[str, Tensor]] = []
        self.scratch: list[Tensor] = []

    def load_state(self, state: list[dict[str, Tensor]]) -> None:
        """Go on from a model's state; it is copied. Its batch is from now on the engine's."""
        self.batch = state[0]["time_mix.shift"].shape[0]
        self.model.batch = self.batch
        self.entries = [{} for _ in state]
        for layer, entries, block in zip(self.layers, self.entries, state, strict=True):
            for key, field in {**SHIFTS, **MEMBRANES}.items():
                if key in block:
                    entries[key] = pad(block[key])
                setattr(layer, field, pointer(entries.get(key)))
            entries["wkv"] = _past(block["time_mix.wkv"])
            for field, row in zip(("mean", "b", "base", "age"), entries["wkv"], strict=True):
                setattr(layer, f"wkv_{field}", pointer(row))
        if "head" in state[-1]:
            self.entries[-1]["head"] = pad(state[-1]["head"])
        self.model.v_head = pointer(self.entries[-1].get("head"))
        self._make_scratch()

    def state(self) -> list[dict[str, Tensor]]:
        """The state as the model has it, in tensors of its own."""
        result = []
        for index, entries in enumerate(self.entries):
            block = {key: self._unpadded(key, x) for key, x in entries.items() if key != "wkv"}
            w = self.decays[index].double()
            block["time_mix.wkv"] = _sums(entries["wkv"], w)[..., : self.width].contiguous()
            result.append(block)
        return result

    def step(self, tokens: Tensor, threads: int) -> Tensor:
        """Logits (B, V) in float32 after `tokens` (B,), int64; the state is one token further.

        Raises ValueError for a token outside the vocabulary, and for a batch that is not the state's.
        """
        if tokens.shape != (self.batch,) or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be ({self.batch},) torch.int64, as the state is, not {tuple(tokens.shape)}"
                f" {tokens.dtype}"
            )
        tokens = tokens.contiguous()
        logits = torch.empty(self.batch, self.vocabulary)
        wrong = self.library.decode_step(
            ctypes.addressof(self.model), pointer(tokens), pointer(logits), max(threads, 1)
        )
        if wrong >= 0:
            raise ValueError(
                f"token {int(tokens[wrong])} of row {wrong}: the vocabulary has {self.vocabulary}"
            )
        return logits

    def matrix_bytes(self) -> int:
        """Bytes of the packed matrices, all of which are read for every token."""
        return self.matrices.numel() * self.matrices.element_size()

    def _fill_layer(self, layer: Layer, parameters: Mapping[str, Tensor], block: str) -> None:
        def matrix(name: str) -> Tensor:
            return panels(parameters[f"{block}{name}.weight"], self.dtype)

        vectors = {
            "ln1_weight": "ln1.weight",
            "ln1_bias": "ln1.bias",
            "ln2_weight": "ln2.weight",
            "ln2_bias": "ln2.bias",
            "mu_key": "time_mix.mu_key",
            "mu_value": "time_mix.mu_value",
            "mu_receptance": "time_mix.mu_receptance",
            "u": "time_mix.time_first",
            "channel_mu_key": "channel_mix.mu_key",
            "channel_mu_receptance": "channel_mix.mu_receptance",
        }
        for field, name in vectors.items():
            setattr(layer, field, self._vector(parameters[block + name]))
        self.decays.append(pad(-torch.exp(parameters[f"{block}time_mix.time_decay"].detach())))
        layer.w = pointer(self.decays[-1])
        inputs = [matrix(f"time_mix.{name}") for name in ("key", "value", "receptance")]
        layer.time_in = self._matrix(torch.stack(inputs, dim=1))
        layer.time_out = self._matrix(matrix("time_mix.output"))
        layer.channel_in = self._matrix(
            torch.cat([matrix("channel_mix.key"), matrix("channel_mix.receptance")])
        )
        layer.channel_out = self._matrix(matrix("channel_mix.value"))

    def _matrix(self, packed: Tensor) -> int | None:
        place = self.matrices[self.filled : self.filled + packed.numel()].view(packed.shape)
        self.filled += packed.numel()
        return pointer(place.copy_(packed))

    def _vector(self, parameter: Tensor) -> int | None:
        self.vectors.append(pad(parameter))
        return pointer(self.vectors[-1])

    def _make_scratch(self) -> None:
        rows, model = self.batch, self.model
        model.arithmetic = FLOAT32
        if self.dtype == torch.bfloat16:
            dots = rows >= BFLOAT16_ROWS and self.library.decode_has_bf16_dots()
            model.arithmetic = BFLOAT16 if dots else WIDENED
        sizes = {"stream": rows * padded(self.width), "gate": rows * padded(self.width)}
        for name in ("mixed_0", "mixed_1", "mixed_2"):
            sizes[name] = self.library.decode_activations(self.width, rows)
        sizes["wide"] = self.library.decode_activations(self.inner, rows)
        self.scratch = [torch.zeros(size) for size in sizes.values()]
        for name, memory in zip(sizes, self.scratch, strict=True):
            setattr(model, name, pointer(memory))

    def _unpadded(self, key: str, x: Tensor) -> Tensor:
        inner = key in ("channel_mix.activation", "channel_mix.value")
        return x[:, : self.inner if inner else self.width].clone()


def _past(sums: Tensor) -> Tensor:
    """WKV's (B, 3, C) rows a, b, m as the (4, B, padded C) that the engine carries: mean, b, base and age."""
    a, b, m = sums.detach().unbind(1)
    mean = torch.where(b == 0, 0.0, a / b)
    return torch.stack([pad(x) for x in (mean, b, m, torch.zeros_like(m))])


def _sums(past: Tensor, w: Tensor) -> Tensor:
    """The inverse: m = base + age w is rounded once, and the rounding made good in a and b."""
    mean, b, base, age = past.double().unbind(0)
    exact = torch.where(base <= EMPTY / 2, base, base + age * w)
    m = exact.float()
    b = b * torch.exp(torch.where(base <= EMPTY / 2, 0.0, exact - m))
    return torch.stack([(mean * b).float(), b.float(), m], dim=1)
