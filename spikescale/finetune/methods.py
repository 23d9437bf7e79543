"""Which parameters are tuned, and how they become an ordinary model again.

full     all parameters
frozen   the embedding and the first n blocks stay as they are
lora     all stay as they are; beside the time-mix projections W, trained W + (alpha / r) B A (Hu et al. 2021)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from spikescale.errors import UserError
from spikescale.model.time_mix import PROJECTIONS
from spikescale.quantization.int8 import is_quantized

if TYPE_CHECKING:
    from spikescale.model import SpikeGPT

Method = Literal["full", "frozen", "lora"]
ADAPTER = "default"  # peft's name for the only adapter


@dataclass(frozen=True)
class MethodSettings:
    """How a model is tuned. Raises UserError for values that mean nothing.

    Attributes:
        method: full, frozen or lora.
        frozen_layers: n of frozen; None: half of the model's layers.
        rank, alpha, dropout: r, the scale's numerator and the dropout on the adapters' input, of lora.
        targets: time-mix projections that have an adapter, of key, value, receptance and output.
    """

    method: Method = "full"
    frozen_layers: int | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UserError(f"method {self.method!r}: must be one of {', '.join(get_args(Method))}")
        if self.frozen_layers is not None and self.method != "frozen":
            raise UserError(f"frozen layers = {self.frozen_layers}: goes with method frozen")
        for name, allowed, good in (
            ("rank", "at least 1", self.rank >= 1),
            ("alpha", "above 0", self.alpha > 0),
            ("dropout", "from 0 to below 1", 0 <= self.dropout < 1),
        ):
            if not good:
                raise UserError(f"LoRA {name} = {getattr(self, name)}: must be {allowed}")
        unknown = [target for target in self.targets if target not in PROJECTIONS]
        if unknown or not self.targets:
            raise UserError(f"LoRA targets {','.join(self.targets)}: must be of {', '.join(PROJECTIONS)}")


class Tuning:
    """A model made ready to be tuned: what is trained requires a gradient, nothing else does.

    Args:
        model: is changed: lora puts adapters into it.
        base: where it was loaded from, noted in the adapter's settings.
        seed: of the adapters' first values, A at random and B zero.

    Raises UserError for a model that cannot be trained, and for more frozen layers than it has.
    """

    def __init__(self, model: "SpikeGPT", settings: MethodSettings, base: str = "", seed: int = 0) -> None:
        if is_quantized(model):
            raise UserError(
                f"{base}: has 8-bit weights, which cannot be trained; tune the model it was made of"
            )
        self.model, self.settings = model, settings
        self.total = sum(parameter.numel() for parameter in model.parameters())
        self._names = set(dict(model.named_parameters()))
        self._peft: Any = None
        if settings.method == "lora":
            self._add_adapters(base, seed)
        else:
            frozen = _frozen_names(model, settings) if settings.method == "frozen" else set()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def merged_weights(self) -> Mapping[str, Tensor]:
        """The weights of an ordinary model; the adapters, if any, are merged and gone after this call."""
        if self._peft is not None:
            self._merge()
        weights = dict(self.model.named_parameters())
        assert weights.keys() == self._names, "what was put into the model must be taken out again"
        return weights

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters alone, as peft reads them (safetensors). Nothing for the other methods."""
        if self._peft is not None:
            # Not asked for embeddings, which are not trained, peft does not look for the base model.
            self._peft.save_pretrained(str(folder), save_embedding_layers=False)

    def _add_adapters(self, base: str, seed: int) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ModuleNotFoundError as error:
            raise UserError(f"method lora needs {error.name}: pip install 'spikescale[lora]'") from None
        settings = self.settings
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=rf".*\.time_mix\.({'|'.join(settings.targets)})",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._peft = get_peft_model(self.model, config)
        config.base_model_name_or_path = base or None  # only now: it would ask the model for its name

    def _merge(self) -> None:
        # Layer by layer: peft's merge_and_unload asks a configuration of transformers' kind.
        from peft.tuners.lora import LoraLayer

        for name, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge(safe_merge=True)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.get_base_layer())
        self._peft = None


def _frozen_names(model: "SpikeGPT", settings: MethodSettings) -> set[str]:
    layers = model.config.layers
    count = layers // 2 if settings.frozen_layers is None else settings.frozen_layers
    if not 0 <= count <= layers:
        raise UserError(f"frozen layers = {count}: must be from 0 to the model's {layers}")
    prefixes = ("embedding.", *(f"blocks.{index}." for index in range(count)))
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
