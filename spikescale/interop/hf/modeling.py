"""SpikeGPT without a head as a transformers model, and what all its models share."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from spikescale.interop.hf.cache import RecurrentCache
from spikescale.interop.hf.configuration import SpikeGPTConfig
from spikescale.model import SpikeGPT
from spikescale.model.init import initial_value


class SpikeGPTPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights of all SpikeGPT models."""

    config_class = SpikeGPTConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (the base class's)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `initialize_weights` knows the parameters by name, which a module alone does not."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give values to the parameters that no file brought, those of spikescale to the backbone.

        They depend on torch's seed and the parameter's name.
        """
        for module in self.modules():
            if isinstance(module, SpikeGPTModel):
                seed = int(torch.randint(2**31, (), device="cpu"))
                config = module.config.model_config()
                for name, parameter in module.spikegpt.named_parameters():
                    _fill(parameter, functools.partial(initial_value, name, parameter.shape, config, seed))
            elif isinstance(module, WithInitialValues):
                for weight, value in module.initial_values():
                    _fill(weight, value)


@runtime_checkable
class WithInitialValues(Protocol):
    """A head that knows what its parameters are before any training."""

    def initial_values(self) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
        """Every parameter and what makes its initial value."""
        ...


def _fill(parameter: Tensor, value: Callable[[], Tensor]) -> None:
    # transformers' mark of a parameter that has its value.
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value())
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def document_starts(attention_mask: Tensor, tokens: int) -> Tensor | None:
    """Where, among the last `tokens` columns of a mask (B, T), text begins after padding: bool (B, tokens).

    There the state is emptied, so that what padding left in it is not seen. None: nowhere. Raises
    ValueError for a mask of another shape, and for a row whose text has a gap.
    """
    if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it should be (batch, tokens), with"
            f" {tokens} tokens or more"
        )
    real = attention_mask.bool()
    starts = torch.zeros_like(real)
    starts[:, 1:] = real[:, 1:] & ~real[:, :-1]
    if not bool(starts.any()):
        return None
    if bool((starts.sum(1) + real[:, 0] > 1).any()):
        raise ValueError("attention_mask: padding within a text; it may only be before or after it")
    return starts[:, -tokens:]


class SpikeGPTModel(SpikeGPTPreTrainedModel):
    """The blocks and the last LayerNorm: tokens in, vectors (B, T, C) out.

    In the driven variant the vectors are the spikes that the head reads. With `reset_at_documents` the state
    is cleared before each `eos_token_id` is read, as in training.
    """

    def __init__(self, config: SpikeGPTConfig) -> None:
        super().__init__(config)
        settings = config.model_config()
        config.document_ends()  # a model that could not be run is refused here
        with torch.device("meta"):
            network = SpikeGPT(settings)
        network.head = nn.Identity()
        on_meta = torch.empty(0).is_meta
        self.spikegpt = network if on_meta else network.to_empty(device="cpu")
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, whose `weight` is (V, C)."""
        return self.spikegpt.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding's table."""
        self.spikegpt.embedding.weight = value.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Vectors (B, T, C) at every token, and the state after the last one if `use_cache`.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), or (B, what was read before + T); 0 is padding. Before the text it leaves
                nothing behind; after it, the state is that of text and padding, so do not go on from there.
            past_key_values: what was read before; it is changed in place, too.
            position_ids: not used: the state knows.

        Raises ValueError for what SpikeGPT has not: embeddings in place of ids, attentions, hidden states.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("SpikeGPT reads input_ids; inputs_embeds are not supported")
        if output_attentions or output_hidden_states:
            raise ValueError("SpikeGPT has no attentions, and keeps no hidden states: hook the blocks")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        starts = None if attention_mask is None else document_starts(attention_mask, input_ids.shape[1])
        if self.spikegpt.config.reset_at_documents:
            ends = torch.tensor(self.config.document_ends(), device=input_ids.device)
            opened = torch.isin(input_ids, ends)
            starts = opened if starts is None else starts | opened
        self.spikegpt.activation_checkpointing = bool(self.gradient_checkpointing and self.training)
        before = None if past_key_values is None else past_key_values.state
        hidden, state = self.spikegpt(input_ids, before, starts)
        cache = None
        if use_cache:
            cache = RecurrentCache() if past_key_values is None else past_key_values
            cache.update_state(state, input_ids.shape[1])
        if return_dict is False:
            return (hidden, cache) if use_cache else (hidden,)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
