"""What other programs call the parameters of a SpikeGPT."""

import re
from dataclasses import dataclass, field

from spikescale.config import ModelConfig

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

NORMS = tuple(f"{norm}.{part}" for norm in ("ln1", "ln2") for part in ("weight", "bias"))
FIRST_NORM = ("ln0.weight", "ln0.bias")  # of block 0 only
MUS = {
    "time_mix": ("mu_key", "mu_value", "mu_receptance"),
    "channel_mix": ("mu_key", "mu_receptance"),
}
MATRICES = {
    "time_mix": ("key", "value", "receptance", "output"),
    "channel_mix": ("key", "value", "receptance"),
}


@dataclass(frozen=True)
class Naming:
    """One program's names.

    Attributes:
        title: how errors call the program's files.
        blocks: prefix of a block, `{}` standing for its number.
        top: the name of each of our parameters outside of blocks.
        inside: the name within a block of each of our names within a block; None: the same.
        mu_shape: whether token-shift mixtures have the shape (1, 1, C) rather than (C,).
        telling: part of names by which a file is known to follow this naming.
    """

    title: str
    blocks: str
    top: dict[str, str]
    inside: dict[str, str] | None
    mu_shape: bool = True
    telling: tuple[str, ...] = field(default=())

    def theirs(self, ours: str) -> str:
        """Their name of our parameter. Raises KeyError for a name that no SpikeGPT has."""
        match = _BLOCK.fullmatch(ours)
        if match is None:
            return self.top[ours]
        local = match[2] if self.inside is None else self.inside[match[2]]
        return self.blocks.format(match[1]) + local

    def their_shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that our parameter has in their files."""
        return (1, 1, *shape) if self.mu_shape and ".mu_" in ours else shape

    def layers(self, names: set[str]) -> int:
        """One more than the highest block among their `names`; 0 if there is none."""
        prefix = re.compile(re.escape(self.blocks).replace(r"\{\}", r"(\d+)"))
        numbers = [int(match[1]) for name in names if (match := prefix.match(name))]
        return max(numbers, default=-1) + 1

    def is_followed(self, names: set[str]) -> bool:
        """Whether some of `names` are of the kind that only this naming has."""
        return any(part in name for name in names for part in self.telling)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `SpikeGPT(config)`, without giving it values."""
    import torch

    from spikescale.model import SpikeGPT

    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in SpikeGPT(config).named_parameters()}


def _inside(first_norm: str, time_mix: str, channel_mix: str, mus: dict[str, str]) -> dict[str, str]:
    names = {name: name for name in NORMS}
    names.update({name: name.replace("ln0", first_norm) for name in FIRST_NORM})
    places = {"time_mix": time_mix, "channel_mix": channel_mix}
    for part, there in places.items():
        names.update({f"{part}.{mu}": f"{there}.{mus[mu]}" for mu in MUS[part]})
        names.update({f"{part}.{key}.weight": f"{there}.{key}.weight" for key in MATRICES[part]})
    names.update({f"time_mix.{name}": f"{time_mix}.{name}" for name in ("time_decay", "time_first")})
    return names


def _top(embedding: str, body: str, head: str) -> dict[str, str]:
    """Names outside of blocks; `body` is the prefix of what only our own classes have beside the two ends."""
    inner = ("ln_out.weight", "ln_out.bias", "head_neuron.tau_logit", "head_neuron.log_threshold")
    ends = {"embedding.weight": f"{embedding}.weight", "head.weight": f"{head}.weight"}
    return {**ends, **{name: body + name for name in inner}}


_LETTERS = {"mu_key": "time_mix_k", "mu_value": "time_mix_v", "mu_receptance": "time_mix_r"}
_WORDS = {"mu_key": "time_mix_key", "mu_value": "time_mix_value", "mu_receptance": "time_mix_receptance"}

# RWKV-4 as its author's programs save it, and SpikeGPT as released, which is derived from them.
BLINK = Naming(
    title="SpikeGPT / RWKV-4 (.pth)",
    blocks="blocks.{}.",
    top=_top("emb", "", "head"),
    inside=_inside("ln0", "att", "ffn", _LETTERS),
    telling=("emb.weight", ".att.", ".ffn."),
)
HF_RWKV = Naming(
    title="transformers RwkvForCausalLM",
    blocks="rwkv.blocks.{}.",
    top=_top("rwkv.embeddings", "rwkv.", "head"),
    inside=_inside("pre_ln", "attention", "feed_forward", _WORDS),
    telling=("rwkv.embeddings.", ".attention.", ".feed_forward."),
)
HF_SPIKEGPT = Naming(
    title="transformers SpikeGPTForCausalLM",
    blocks="backbone.spikegpt.blocks.{}.",
    top=_top("backbone.spikegpt.embedding", "backbone.spikegpt.", "lm_head"),
    inside=None,
    mu_shape=False,
    telling=("backbone.spikegpt.",),
)
SPIKESCALE = Naming(
    title="spikescale",
    blocks="blocks.{}.",
    top=_top("embedding", "", "head"),
    inside=None,
    mu_shape=False,
    telling=("embedding.weight", ".time_mix.", ".channel_mix."),
)
# In the order in which a file is compared with them: names of an earlier one may look like a later one's.
NAMINGS = (HF_SPIKEGPT, HF_RWKV, BLINK, SPIKESCALE)
