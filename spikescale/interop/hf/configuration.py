"""The settings of a model, as transformers keeps them."""

from typing import Any

from pydantic import ValidationError
from transformers import PretrainedConfig

from spikescale.config import ModelConfig
from spikescale.errors import UserError


class SpikeGPTConfig(PretrainedConfig):
    """Settings of `SpikeGPT` under transformers' names.

    Args:
        vocab_size, hidden_size, num_hidden_layers: shape (ours: vocab_size, width, layers).
        spikescale: the other settings of `spikescale.config.ModelConfig`: variant, context_length,
            binary_embedding, dropout, neuron, ...
        classifier_hidden_size: inner width of the head of the classification model; None: hidden_size.
        classifier_dropout: before each of that head's two layers, in training.

    Raises UserError for a setting that is unknown or out of range.
    """

    model_type = "spikegpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the base class's)

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        spikescale: dict[str, Any] | None = None,
        classifier_hidden_size: int | None = None,
        classifier_dropout: float = 0.1,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.spikescale = dict(spikescale or {})
        self.classifier_hidden_size = classifier_hidden_size
        self.classifier_dropout = classifier_dropout
        self.use_cache = use_cache
        others.setdefault("tie_word_embeddings", False)
        super().__init__(**others)
        if self.tie_word_embeddings:
            raise UserError("tie_word_embeddings: SpikeGPT's head has weights of its own, it must be false")
        self.model_config()

    @classmethod
    def from_model_config(cls, config: ModelConfig, **others: Any) -> "SpikeGPTConfig":
        """The same settings under transformers' names; `others` are transformers' own."""
        assert config.vocab_size is not None
        rest = config.model_dump(mode="json", exclude={"vocab_size", "width", "layers"})
        return cls(config.vocab_size, config.width, config.layers, rest, **others)

    def model_config(self) -> ModelConfig:
        """The same settings as spikescale's. Raises UserError."""
        shape = {
            "vocab_size": self.vocab_size,
            "width": self.hidden_size,
            "layers": self.num_hidden_layers,
        }
        try:
            return ModelConfig.model_validate({**self.spikescale, **shape})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(f"config.json: spikescale.{key}: {first['msg']}") from None

    def document_ends(self) -> list[int]:
        """Ids of the tokens that clear the state before they are read; none unless `reset_at_documents`.

        Raises UserError where they should and `eos_token_id` does not say which.
        """
        if not self.model_config().reset_at_documents:
            return []
        ends = getattr(self, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        if not ends:
            raise UserError(
                "config.json: eos_token_id is not set, and spikescale.reset_at_documents clears the state"
                " there: set it to the id that ends a document"
            )
        return ends

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained on at a time; no limit of what it can read."""
        return self.model_config().context_length
