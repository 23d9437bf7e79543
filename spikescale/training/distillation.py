"""Learning from a trained model's predictions beside the text (Hinton et al. 2015).

The loss is (1 - w) CE + w T^2 KL(teacher || student), both distributions at temperature T; T^2 keeps the size
of the second's gradient. A float twin as the teacher is how spiking models are often brought nearer to it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from spikescale.config import RunConfig
from spikescale.data_pipeline.tokenizers import Tokenizer
from spikescale.errors import UserError
from spikescale.model import language_model_loss
from spikescale.model.store import find_model_folder, load_model_folder


class Teacher:
    """A trained model, frozen, that a run learns from."""

    def __init__(self, model: torch.nn.Module, weight: float, temperature: float) -> None:
        self.model = model.requires_grad_(False).eval()
        self.weight, self.temperature = weight, temperature

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, device: torch.device) -> "Teacher | None":
        """The teacher that the run names, if any. Raises UserError for one that reads other ids."""
        train = config.train
        if train.distill_from is None:
            return None
        loaded = load_model_folder(find_model_folder(train.distill_from), backend=None)
        same = loaded.tokenizer.sha256 == tokenizer.sha256
        if not same or loaded.config.vocab_size != config.model.vocab_size:
            raise UserError(
                f"train.distill_from = {train.distill_from}: reads other ids than this run"
                f" ({loaded.config.vocab_size} of a {loaded.tokenizer.kind} tokenizer, and not"
                f" {config.model.vocab_size} of this {tokenizer.kind} one)"
            )
        if loaded.config.reset_at_documents != config.model.reset_at_documents:
            raise UserError(
                f"train.distill_from = {train.distill_from}: model.reset_at_documents is"
                f" {loaded.config.reset_at_documents} there and {config.model.reset_at_documents} here"
            )
        return cls(loaded.model.to(device), train.distill_weight, train.distill_temperature)

    def loss(
        self, logits: Tensor, tokens: Tensor, targets: Tensor, reset: Tensor | None, regulariser: float
    ) -> tuple[Tensor, Tensor]:
        """(loss to minimise, cross-entropy to report) as `language_model_loss`, in nats a token.

        logits (B, T, V) of the student for `tokens` (B, T).
        """
        with torch.no_grad():
            taught, _ = self.model(tokens, reset=reset)
        total, cross_entropy = language_model_loss(logits, targets, regulariser)
        hard = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        divergence = divergence_from(taught, logits, self.temperature)
        return total + self.weight * (divergence - hard), cross_entropy


def divergence_from(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of two (..., V) logits at a temperature T, the mean in nats a token."""
    wanted = F.log_softmax(teacher.float().flatten(0, -2) / temperature, dim=-1)
    given = F.log_softmax(student.float().flatten(0, -2) / temperature, dim=-1)
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
