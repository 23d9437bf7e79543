"""SpikeGPT as a language model of transformers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from spikescale.interop.hf.cache import RecurrentCache
from spikescale.interop.hf.configuration import SpikeGPTConfig
from spikescale.interop.hf.modeling import SpikeGPTModel, SpikeGPTPreTrainedModel
from spikescale.model import SpikeGPT
from spikescale.model.init import initial_value


class Head(nn.Linear):
    """The projection to the vocabulary, with the initial weights of SpikeGPT's."""

    def __init__(self, config: SpikeGPTConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.settings = config.model_config()

    def initial_values(self) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
        """The weight and what makes its initial value."""
        seed = int(torch.randint(2**31, (), device="cpu"))
        yield (
            self.weight,
            lambda: initial_value("head.weight", self.weight.shape, self.settings, seed),
        )


class SpikeGPTForCausalLM(SpikeGPTPreTrainedModel, GenerationMixin):
    """Logits of the next token; `generate` keeps the recurrent state, of constant size, as its cache."""

    def __init__(self, config: SpikeGPTConfig) -> None:
        super().__init__(config)
        self.backbone = SpikeGPTModel(config)
        self.lm_head = Head(config)
        self.post_init()

    @classmethod
    def from_spikegpt(cls, model: SpikeGPT, **others: Any) -> "SpikeGPTForCausalLM":
        """The same model, sharing its parameters; `others` go into the configuration."""
        config = SpikeGPTConfig.from_model_config(model.config, **others)
        with torch.device("meta"):
            made = cls(config)
        parameters = dict(model.named_parameters())
        made.lm_head.weight = parameters.pop("head.weight")
        for name, parameter in parameters.items():
            owner, _, attribute = name.rpartition(".")
            setattr(made.backbone.spikegpt.get_submodule(owner), attribute, parameter)
        return made.train(model.training)

    def to_spikegpt(self) -> SpikeGPT:
        """The same model as spikescale's own, sharing its parameters."""
        with torch.device("meta"):
            model = SpikeGPT(self.config.model_config())
        model.head.weight = self.lm_head.weight
        for name, parameter in self.backbone.spikegpt.named_parameters():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)
        return model.train(self.training)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings  # type: ignore[assignment]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # of keys and values, which there are none of

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("attention_mask: a prompt ends in padding; generation needs it on the left")
        if generation_config.cache_implementation is not None:
            kind = generation_config.cache_implementation
            raise ValueError(f"cache_implementation {kind!r}: SpikeGPT's cache is its recurrent state")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RecurrentCache()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), or of the last `logits_to_keep` tokens, and the mean cross-entropy in nats.

        `labels` (B, T) are the ids themselves, shifted here; -100 is not counted. The rest as for
        `SpikeGPTModel`.
        """
        read = self.backbone(input_ids, attention_mask, past_key_values, use_cache, **others)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(read.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        if return_dict is False:
            return tuple(x for x in (loss, logits, read.past_key_values) if x is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=read.past_key_values)
