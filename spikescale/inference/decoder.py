"""Token by token on the CPU at the speed of memory: `Decoder`, the recurrent form in one call a token."""

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from spikescale.errors import UserError
from spikescale.kernels.backend import choose_backend
from spikescale.kernels.decode.engine import Engine, EngineConfig

if TYPE_CHECKING:
    from spikescale.model import SpikeGPT
    from spikescale.model.state import State

Weights = Literal["float32", "bfloat16"]
_NEURONS: dict[str, Literal["none", "heaviside", "lif"]] = {
    "rwkv": "none",
    "heaviside-rwkv": "heaviside",
    "spikegpt-b": "lif",
    "spikegpt": "lif",
    "spikegpt-driven": "none",
}


class Decoder:
    """A SpikeGPT that reads one token a row at a time.

    The state is the model's own: read a prompt with `model(prompt)`, hand its state over with `load_state`,
    go on with `step`, and take the state back with `state`. Without `load_state` nothing was before.

    Args:
        model: float32, on the CPU and whole. The matrices are copied; what becomes of the model afterwards is
            not seen here.
        weights: what the matrices are kept in. "float32": logits equal the model's to 1e-5 relative.
            "bfloat16": half the memory, up to twice the speed; each matrix is rounded once, to 8 bits of
            mantissa, and from 8 rows on so are the activations where the CPU has AVX512-BF16.
        backend: see `spikescale.kernels.backend`; "reference" calls the model.
        skip_zeros: with a single row, leave the weights unread that zero activations (relu^2, silent
            neurons) would be multiplied with. An infinity or NaN among them then goes unnoticed.

    Raises UserError for a model that cannot be decoded so, and for a backend that cannot be used.
    """

    def __init__(
        self,
        model: "SpikeGPT",
        weights: Weights = "float32",
        backend: str = "auto",
        skip_zeros: bool = True,
    ) -> None:
        if weights not in get_args(Weights):
            raise UserError(f"weights {weights!r}: must be one of {', '.join(get_args(Weights))}")
        if obstacle := obstacle_to_decoding(model):
            raise UserError(f"the decoder cannot run this model: {obstacle}")
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        self.backend = choose_backend("decode", backend, "cpu", dtype)
        self._model = model
        self._state: State | None = None  # of the reference only
        self._engine: Engine | None = None
        if self.backend != "reference":
            parameters = dict(model.named_parameters())
            self._engine = Engine(parameters, _config(model), self.backend, dtype, skip_zeros)
        elif weights != "float32":
            raise UserError(f"weights {weights!r}: only the C++ backends have them")

    def load_state(self, state: "State") -> None:
        """Go on from `state`, which is copied. The batch is from now on that of the state."""
        if self._engine is not None:
            self._engine.load_state(state)
        else:
            self._state = [{key: x.detach().clone() for key, x in block.items()} for block in state]

    def state(self) -> "State":
        """What the tokens read so far leave behind, as a state that the model takes: a copy.

        Raises ValueError before the first token, unless a state was loaded.
        """
        if self._engine is not None:
            state = self._engine.state()
        else:
            state = [{key: x.clone() for key, x in block.items()} for block in self._state or []]
        if not state:
            raise ValueError("nothing was read and no state loaded: there is no state yet")
        return state

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V), float32, of what follows `tokens` (B,), int64; the state is one token further.

        Raises ValueError for a token outside the vocabulary and for a batch that is not the state's.
        """
        if self._engine is None:
            logits, self._state = self._model(tokens[:, None], self._state)
            return logits[:, -1]
        if not self._engine.batch:
            self._engine.load_state(self._model.initial_state(tokens.shape[0]))
        return self._engine.step(tokens, torch.get_num_threads())

    def bytes_per_step(self) -> int:
        """Bytes of the matrices, each of which is read once for a token of all rows."""
        if self._engine is not None:
            return self._engine.matrix_bytes()
        embedding = self._model.embedding.weight
        return sum(4 * p.numel() for p in self._model.parameters() if p.dim() > 1 and p is not embedding)


def obstacle_to_decoding(model: nn.Module) -> str:
    """Why `Decoder` cannot run a model; empty if it can."""
    from spikescale.model import SpikeGPT

    if not isinstance(model, SpikeGPT):
        return f"{type(model).__name__} is not a SpikeGPT"
    weight = model.head.weight
    config = model.config
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}, not on the CPU"
    if weight.dtype != torch.float32:
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}, not float32"
    if not config.neuron.plain:
        return "its neurons are learned, graded, signed or read normalised currents"
    if hasattr(weight, "qdata"):
        return "its weights are 8-bit integers, which torch multiplies"
    if type(model.head) is not nn.Linear or weight.shape != (config.vocab_size, config.width):
        return "its weights are spread over processes"
    return ""


def _config(model: "SpikeGPT") -> EngineConfig:
    from spikescale.model.norm import stream_grid

    config, neuron = model.config, model.config.neuron
    after = _NEURONS[config.variant]
    return EngineConfig(
        layers=config.layers,
        binary_embedding=config.binary_embedding,
        neuron=after,
        tau=neuron.tau,
        v_threshold=neuron.v_threshold,
        v_reset=neuron.v_reset,
        soft_reset=neuron.soft_reset,
        eps=model.ln_out.eps,
        stream_grid=0.0 if after == "none" else stream_grid(config.layers),
    )
