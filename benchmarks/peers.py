"""What the step of `train_step.py` is held against, and the step that every model of it takes.

- `GemmFloor`: the matrix products of a SpikeGPT and nothing else.
- `gpt2`, `rwkv`: Hugging Face models of the same depth, width and vocabulary (package transformers).
- `LoopSpikeGPT`: SpikeGPT as it is written with plain torch and SpikingJelly's multi-step LIF node, with a
  loop over tokens for WKV. Its parameters have the names of `spikescale.model.SpikeGPT`, so that
  `check_agreement` can show that the two compute the same.
"""

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from common import peak_bytes, random_tokens, reset_peak, resident_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.model import SpikeGPT, language_model_loss

EXPANSION = 4  # inner width of the feed-forward part over the model's


class MissingPeerError(UserError):
    """A peer cannot run here, and why."""


class TrainingStep:
    """One whole optimizer step of a language model: forward, loss, backward, clipping, Adam.

    bfloat16 autocast over float32 weights, RWKV's logit regulariser 1e-4, gradient norm clipped to 1, and
    torch's fused Adam with the rate and betas of the SpikeGPT paper: the same for every model.

    Args:
        model: holds the parameters.
        logits: from tokens (B, T) to logits (B, T, V).
        keep_gradients: zero the gradients after a step and do not free them, so that a later step's peak
            of memory is that of its activations.
    """

    def __init__(
        self, model: nn.Module, logits: Callable[[Tensor], Tensor], keep_gradients: bool = False
    ) -> None:
        self.model, self.logits, self.keep_gradients = model.train(), logits, keep_gradients
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=6e-4, betas=(0.9, 0.99), eps=1e-8, fused=True)

    def __call__(self, tokens: Tensor) -> float:
        """Train on tokens (B, T + 1) once; the cross-entropy, nats a token. UserError if it is not finite."""
        with record_function("forward"), torch.autocast("cpu", torch.bfloat16):
            logits = self.logits(tokens[:, :-1])
        with record_function("loss"):
            loss, cross_entropy = language_model_loss(logits, tokens[:, 1:], 1e-4)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        value = float(cross_entropy)
        if not math.isfinite(value):
            raise UserError(f"{type(self.model).__name__}: the loss is {value}; nothing is reported")
        return value

    def count_parameters(self) -> int:
        """Number of trained weights; a tied one counts once."""
        return sum(parameter.numel() for parameter in self.parameters)


def spikegpt(
    config: ModelConfig, checkpointing: bool = False, compact: bool = True, **options: Any
) -> TrainingStep:
    """The step of this project's model; `options` go to `TrainingStep`.

    `compact`: activations are kept as counts of spikes and as bits where they can be.
    """
    model = SpikeGPT(config)
    model.activation_checkpointing, model.compact_activations = checkpointing, compact
    return TrainingStep(model, lambda tokens: model(tokens)[0], **options)


def spikegpt_without_dropout(config: ModelConfig, **options: Any) -> TrainingStep:
    """The same with dropout 0."""
    return spikegpt(config.model_copy(update={"dropout": 0.0}), **options)


def spikegpt_checkpointed(config: ModelConfig, **options: Any) -> TrainingStep:
    """The preset with activation checkpointing. With dropout the stream is no count: it stays in float32."""
    return spikegpt(config, checkpointing=True, **options)


def checkpointed_counts(config: ModelConfig, **options: Any) -> TrainingStep:
    """Activation checkpointing with dropout 0: block inputs are kept as counts of spikes, a byte each."""
    return spikegpt_without_dropout(config, checkpointing=True, **options)


def checkpointed_floats(config: ModelConfig, **options: Any) -> TrainingStep:
    """The same with block inputs kept in float32."""
    return checkpointed_counts(config, compact=False, **options)


def driven_bits(config: ModelConfig, **options: Any) -> TrainingStep:
    """Variant spikegpt-driven with dropout 0: the spikes that its projections read are kept as bits."""
    return spikegpt_without_dropout(config.model_copy(update={"variant": "spikegpt-driven"}), **options)


def driven_numbers(config: ModelConfig, **options: Any) -> TrainingStep:
    """The same with spikes kept in bfloat16, as projections read them."""
    return driven_bits(config, compact=False, **options)


class GemmFloor:
    """Forward, gradient of the input and gradient of the weight of every projection of a SpikeGPT.

    All in bfloat16, each projection with a weight of its own; inputs are shared between projections, which
    favours the caches: no step that computes these products is faster.
    """

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        width, inner = config.width, EXPANSION * config.width
        # A block: five of width x width (key, value, receptance, output; receptance), and the two wide ones.
        block = [(width, width)] * 5 + [(width, inner), (inner, width)]
        shapes = block * config.layers + [(width, vocab_size(config))]
        generator = torch.Generator().manual_seed(0)

        def random(rows: int, columns: int) -> Tensor:
            scale = 1 / math.sqrt(columns)
            return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()

        self.rows = {size: random(tokens, size) for shape in shapes for size in shape}
        self.weights = [random(to_width, from_width) for from_width, to_width in shapes]
        self.operations = sum(6 * tokens * weight.numel() for weight in self.weights)

    def __call__(self) -> None:
        """Every product once: 6 operations a weight and token, `operations` in all."""
        for weight in self.weights:
            x, gradient = self.rows[weight.shape[1]], self.rows[weight.shape[0]]
            F.linear(x, weight)
            gradient @ weight
            gradient.t() @ x


def vocab_size(config: ModelConfig) -> int:
    """The vocabulary of a configuration that has one."""
    if config.vocab_size is None:
        raise UserError("model.vocab_size is not set")
    return config.vocab_size


def package(name: str) -> ModuleType:
    """Import a peer's module. Raises MissingPeerError, with the reason, where it does not import."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise MissingPeerError(f"{reason} (pip install 'spikescale[bench]')") from None


def gpt2(config: ModelConfig, **options: Any) -> TrainingStep:
    """Hugging Face's GPT-2 with SDPA attention, heads of 64 and no dropout."""
    transformers = package("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size(config),
            n_positions=config.context_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=max(config.width // 64, 1),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    return TrainingStep(model, lambda tokens: model(tokens).logits, **options)


def rwkv(config: ModelConfig, **options: Any) -> TrainingStep:
    """Hugging Face's RWKV-4, which without a GPU computes WKV in a loop over tokens."""
    transformers = package("transformers")
    model = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            vocab_size=vocab_size(config),
            context_length=config.context_length,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            use_cache=False,
        )
    )
    return TrainingStep(model, lambda tokens: model(tokens).logits, **options)


def spikingjelly(config: ModelConfig, **options: Any) -> TrainingStep:
    """SpikeGPT with SpikingJelly's neurons, dropout 0."""
    model = LoopSpikeGPT(config)
    return TrainingStep(model, model, **options)


def loop_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """WKV as a loop over tokens in plain torch, differentiated by autograd.

    SpikeGPT Eqs. 8-9: w, u (C,); k, v (B, T, C); all float32. The sums are kept as a e^m and b e^m with m
    a running maximum, so that no exponent is positive.
    """
    a, b = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
    m = torch.full_like(k[:, 0], -1e38)
    outputs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        top = torch.maximum(m, u + k_t)
        past, now = torch.exp(m - top), torch.exp(u + k_t - top)
        outputs.append((past * a + now * v_t) / (past * b + now))
        top = torch.maximum(m + w, k_t)
        past, now = torch.exp(m + w - top), torch.exp(k_t - top)
        a, b, m = past * a + now * v_t, past * b + now, top
    return torch.stack(outputs, dim=1)


def shifted(x: Tensor) -> Tensor:
    """The previous token's vector at every token, zeros at the first: (B, T, C)."""
    return F.pad(x, (0, 0, 1, -1))


def channel_weights(width: int, count: int) -> list[nn.Parameter]:
    """`count` weights a channel, to be overwritten by initial ones."""
    return [nn.Parameter(torch.zeros(width)) for _ in range(count)]


class LoopTimeMix(nn.Module):
    """TimeMix (SpikeGPT Sec. 3.4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mu_key, self.mu_value, self.mu_receptance = channel_weights(width, 3)
        self.time_decay, self.time_first = channel_weights(width, 2)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.receptance, self.output = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        previous = shifted(x)
        k = self.key(torch.lerp(previous, x, self.mu_key))
        v = self.value(torch.lerp(previous, x, self.mu_value))
        r = self.receptance(torch.lerp(previous, x, self.mu_receptance))
        y = loop_wkv(-torch.exp(self.time_decay), self.time_first, k.float(), v.float())
        return self.output(torch.sigmoid(r) * y)


class LoopChannelMix(nn.Module):
    """ChannelMix (SpikeGPT Sec. 3.5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mu_key, self.mu_receptance = channel_weights(width, 2)
        self.key = nn.Linear(width, EXPANSION * width, bias=False)
        self.value = nn.Linear(EXPANSION * width, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        previous = shifted(x)
        k = self.key(torch.lerp(previous, x, self.mu_key))
        r = self.receptance(torch.lerp(previous, x, self.mu_receptance))
        return torch.sigmoid(r) * self.value(torch.relu(k).square())


class LoopBlock(nn.Module):
    """Pre-norm block that adds spikes (SpikeGPT Sec. 3.3)."""

    def __init__(self, config: ModelConfig, first: bool) -> None:
        super().__init__()
        if first:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1, self.ln2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.time_mix, self.channel_mix = LoopTimeMix(config.width), LoopChannelMix(config.width)
        self.time_neuron, self.channel_neuron = lif_node(config), lif_node(config)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream (B, T, C) after this block."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        x = x + fire(self.time_neuron, self.time_mix(self.ln1(x)))
        return x + fire(self.channel_neuron, self.channel_mix(self.ln2(x)))


class LoopSpikeGPT(nn.Module):
    """SpikeGPT of variant "spikegpt" from torch's and SpikingJelly's modules, without dropout.

    Called with tokens (B, T), it returns logits (B, T, V). Its initial weights are SpikeGPT's. Raises
    MissingPeerError without SpikingJelly, UserError for another variant.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.variant != "spikegpt":
            raise UserError(f"LoopSpikeGPT has no variant {config.variant}")
        base = "spikingjelly.activation_based"
        self.reset_net = package(f"{base}.functional").reset_net
        self.spike = package(f"{base}.surrogate").ATan(alpha=config.neuron.surrogate_alpha)
        self.binary_embedding = config.binary_embedding
        self.embedding = nn.Embedding(vocab_size(config), config.width)
        self.blocks = nn.ModuleList(LoopBlock(config, index == 0) for index in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocab_size(config), bias=False)
        self.load_state_dict(SpikeGPT(config).state_dict())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        self.reset_net(self)
        x = self.embedding(tokens)
        if self.binary_embedding:
            x = self.spike(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_out(x))


def lif_node(config: ModelConfig) -> nn.Module:
    """SpikingJelly's neuron of `config.neuron`, for whole sequences."""
    neuron, base = config.neuron, "spikingjelly.activation_based"
    return package(f"{base}.neuron").LIFNode(
        tau=neuron.tau,
        decay_input=True,
        v_threshold=neuron.v_threshold,
        v_reset=None if neuron.soft_reset else neuron.v_reset,
        surrogate_function=package(f"{base}.surrogate").ATan(alpha=neuron.surrogate_alpha),
        detach_reset=neuron.detach_reset,
        step_mode="m",
    )


def fire(neuron: nn.Module, current: Tensor) -> Tensor:
    """Spikes (B, T, C) of a SpikingJelly neuron, which wants time first; the membrane is float32."""
    return neuron(current.float().transpose(0, 1)).transpose(0, 1)


MODELS: dict[str, Callable[..., TrainingStep]] = {
    "spikegpt": spikegpt,
    "spikegpt-no-dropout": spikegpt_without_dropout,
    "spikegpt-checkpointed": spikegpt_checkpointed,
    "checkpointed-counts": checkpointed_counts,
    "checkpointed-floats": checkpointed_floats,
    "driven-bits": driven_bits,
    "driven-numbers": driven_numbers,
    "gpt2": gpt2,
    "rwkv": rwkv,
    "spikingjelly": spikingjelly,
}


def step_memory(name: str, config: ModelConfig, batch: int, length: int, threads: int) -> dict[str, int]:
    """Bytes that one step of MODELS[name] needs at its peak; call it with `in_own_process`.

    `step_bytes`: the peak less what the process holds once the model is made: gradients, Adam's moments and
    activations. `activation_bytes`: the peak less what it holds after a step of four tokens, which has
    allocated the gradients and the moments.
    """
    torch.set_num_threads(threads)
    tokens = random_tokens(batch, length, vocab_size(config))
    step = MODELS[name](config, keep_gradients=True)
    constructed = resident_bytes()
    step(random_tokens(1, 4, vocab_size(config)))
    stepped = resident_bytes()
    reset_peak()
    step(tokens)
    peak = peak_bytes()
    return {"step_bytes": peak - constructed, "activation_bytes": peak - stepped}


@torch.no_grad()
def check_agreement(config: ModelConfig) -> float:
    """Refuse a comparison of different models: LoopSpikeGPT must compute what SpikeGPT computes.

    Both get the same random weights, of the width and depth of `config` cut to 64 and 2, and read two
    sequences of 64 tokens in float32. Returns the share of the tokens whose logits differ by more than
    1e-4 of the largest; UserError above 0.1. Not 0, as a neuron within rounding of its threshold may fire
    in one of them only, and what follows it differs.
    """
    small = config.model_copy(update={"layers": min(config.layers, 2), "width": min(config.width, 64)})
    ours, theirs = SpikeGPT(small).eval(), LoopSpikeGPT(small).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in ours.parameters():
        # The initial projections are zeros, with which no neuron fires.
        if parameter.dim() == 2:
            parameter.normal_(0, 2 / math.sqrt(parameter.shape[1]), generator=generator)
    theirs.load_state_dict(ours.state_dict())
    tokens = random_tokens(2, 63, vocab_size(config))
    expected = theirs(tokens)
    difference = (ours(tokens)[0] - expected).abs().amax(dim=-1) / expected.abs().max()
    share = float((~(difference <= 1e-4)).float().mean())
    if share > 0.1:
        raise UserError(f"SpikeGPT and LoopSpikeGPT disagree on {share:.0%} of the tokens; nothing was timed")
    return share
