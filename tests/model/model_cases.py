"""Small models with lively weights, and SpikeGPT written once more from its formulas."""

import torch
from torch import Tensor

from spikescale.config.schema import ModelConfig, NeuronConfig
from spikescale.model import SpikeGPT

VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")
VOCABULARY = 50


def make_config(variant: str = "spikegpt", **changes: object) -> ModelConfig:
    values = {"layers": 2, "width": 33, "vocab_size": VOCABULARY, "binary_embedding": variant != "rwkv"}
    return ModelConfig(variant=variant, **{**values, **changes})


def make_model(variant: str = "spikegpt", scale: float = 0.5, **changes: object) -> SpikeGPT:
    """A model whose initial zeros are replaced by random weights, so that every part matters."""
    model = SpikeGPT(make_config(variant, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(scale * noise)
            else:
                parameter.add_(0.1 * noise)
    return model


def make_tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def record_spikes(model: SpikeGPT) -> dict[str, list[Tensor]]:
    """A dictionary that fills with every neuron's output, call after call."""
    spikes: dict[str, list[Tensor]] = {name: [] for name, _ in model.neurons()}
    for name, neuron in model.neurons():
        neuron.register_forward_hook(lambda _, __, output, name=name: spikes[name].append(output[0].detach()))
    return spikes


class WrittenOut:
    """The model token by token in float64, in formulas: slow, and sharing no code with the package."""

    def __init__(self, model: SpikeGPT) -> None:
        self.config = model.config
        self.p = {name: value.detach().double() for name, value in model.named_parameters()}
        self.state: dict[str, Tensor | float] = {}

    def logits(self, tokens: Tensor) -> Tensor:
        return torch.stack([torch.stack([self.step(token) for token in row]) for row in self.rows(tokens)])

    def rows(self, tokens: Tensor) -> Tensor:
        for row in tokens:
            self.state = {}
            yield row

    def lif(self, key: str, x: Tensor) -> Tensor:
        neuron: NeuronConfig = self.config.neuron
        v = self.state.get(key, 0.0)
        h = v + (x - (v - neuron.v_reset)) / neuron.tau
        s = (h >= neuron.v_threshold).double()
        self.state[key] = h * (1 - s) + neuron.v_reset * s
        return s

    def norm(self, key: str, x: Tensor) -> Tensor:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * self.p[f"{key}.weight"] + self.p[f"{key}.bias"]

    def project(self, key: str, x: Tensor) -> Tensor:
        if self.config.variant == "spikegpt-driven":
            x = self.lif(f"{key}.lif", x)
        return self.p[f"{key}.weight"] @ x

    def fire(self, key: str, x: Tensor) -> Tensor:
        if self.config.variant in ("rwkv", "spikegpt-driven"):
            return x
        return (x >= 0).double() if self.config.variant == "heaviside-rwkv" else self.lif(key, x)

    def time_mix(self, key: str, x: Tensor) -> Tensor:
        last = self.state.get(f"{key}.last", torch.zeros_like(x))
        self.state[f"{key}.last"] = x

        def mixed(name: str) -> Tensor:
            mu = self.p[f"{key}.mu_{name}"]
            return mu * x + (1 - mu) * last

        k = self.project(f"{key}.key", mixed("key"))
        v = self.project(f"{key}.value", mixed("value"))
        r = self.project(f"{key}.receptance", mixed("receptance"))
        w, u = -torch.exp(self.p[f"{key}.time_decay"]), self.p[f"{key}.time_first"]
        a, b = self.state.get(f"{key}.a", 0.0), self.state.get(f"{key}.b", 0.0)
        y = (a + torch.exp(u + k) * v) / (b + torch.exp(u + k))
        self.state[f"{key}.a"] = torch.exp(w) * a + torch.exp(k) * v
        self.state[f"{key}.b"] = torch.exp(w) * b + torch.exp(k)
        return self.project(f"{key}.output", y / (1 + torch.exp(-r)))

    def channel_mix(self, key: str, x: Tensor) -> Tensor:
        last = self.state.get(f"{key}.last", torch.zeros_like(x))
        self.state[f"{key}.last"] = x
        mu_k, mu_r = self.p[f"{key}.mu_key"], self.p[f"{key}.mu_receptance"]
        k = self.project(f"{key}.key", mu_k * x + (1 - mu_k) * last)
        g = self.lif(f"{key}.g", k) if self.config.variant == "spikegpt-b" else k.clamp(min=0) ** 2
        r = self.project(f"{key}.receptance", mu_r * x + (1 - mu_r) * last)
        return self.project(f"{key}.value", g) / (1 + torch.exp(-r))

    def step(self, token: Tensor) -> Tensor:
        x = self.p["embedding.weight"][token]
        if self.config.binary_embedding:
            x = (x >= 0).double()
        x = self.norm("blocks.0.ln0", x)
        for layer in range(self.config.layers):
            block = f"blocks.{layer}"
            x = x + self.fire(f"{block}.1", self.time_mix(f"{block}.time_mix", self.norm(f"{block}.ln1", x)))
            x = x + self.fire(
                f"{block}.2", self.channel_mix(f"{block}.channel_mix", self.norm(f"{block}.ln2", x))
            )
        return self.project("head", self.norm("ln_out", x))


def closed_form_count(layers: int, width: int, vocabulary: int) -> int:
    """13 d^2 of projections and 11 d of vectors a layer; ln0, ln_out; embedding and head."""
    return layers * (13 * width**2 + 11 * width) + 4 * width + 2 * vocabulary * width
