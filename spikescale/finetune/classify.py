"""Training a classifier until its validation accuracy stops rising."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.finetune.classifiers import Encoder, SpikeClassifier
from spikescale.finetune.labelled import Examples, Labelled
from spikescale.training.parameter_groups import parameter_groups

# Batches are made of texts of like length, drawn from so many batches' worth at a time.
_POOL = 16


@dataclass(frozen=True)
class ClassifySettings:
    """How a classifier is trained.

    Attributes:
        epochs: the most passes over the training texts; patience: so many without a better validation
            accuracy, or the same with a lower loss, end the training. The weights of the best epoch are kept.
        batch_size: texts; max_tokens: longer texts are cut.
        lr: of the pretrained or new body; head_lr: of the classification head. Both rise over the first
            `warmup` of all steps that `epochs` would take and fall linearly to a tenth.
        class_weights: "balanced" weighs classes in the loss by the inverse of their frequency.
        device: where the network is trained.
    """

    epochs: int = 12
    patience: int = 3
    batch_size: int = 32
    max_tokens: int = 256
    lr: float = 1e-3
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    class_weights: Literal["none", "balanced"] = "none"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for key in ("epochs", "patience", "batch_size", "max_tokens", "lr", "head_lr", "clip"):
            if not getattr(self, key) > 0:
                raise UserError(f"--{key.replace('_', '-')} {getattr(self, key)}: must be above 0")

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """How predictions compare with labels: shares from 0 to 1, and the mean loss in nats."""

    accuracy: float
    macro_f1: float
    loss: float


@dataclass(frozen=True)
class Trained:
    """A finished training: scores on the test split at the best epoch, on the validation split at each."""

    test: Scores
    valid: list[Scores]
    train_loss: list[float]
    best_epoch: int  # from 1 on


def train_classifier(
    model: nn.Module,
    encode: Encoder,
    task: Labelled,
    settings: ClassifySettings,
    seed: int,
    progress: Callable[[int, int, int, float], None] = lambda epoch, done, total, accuracy: None,
) -> Trained:
    """Train `model` on the settings' device and leave it there with the weights of its best epoch.

    The order of the texts is by `seed`; dropout by torch's own. `progress` is called with the epoch (from 1
    on), batches done and in all, and the best validation accuracy so far. Raises UserError for a loss that is
    no number.
    """
    train = _encoded(task.train, encode, settings.max_tokens)
    valid = _encoded(task.valid, encode, settings.max_tokens)
    test = _encoded(task.test, encode, settings.max_tokens)
    weights = None
    if settings.class_weights == "balanced":
        weights = class_weights(task.train.labels, len(task.classes)).to(settings.device)
    model.to(settings.device)
    optimizer = _optimizer(model, settings)
    batches = math.ceil(len(train) / settings.batch_size)
    steps = batches * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _factor(step, steps, max(1, round(settings.warmup * steps)))
    )
    order = torch.Generator().manual_seed(seed)
    history: list[Scores] = []
    losses: list[float] = []
    best, kept = -1, {}
    for epoch in range(settings.epochs):
        model.train()
        total = 0.0
        for done, rows in enumerate(_shuffled(train, settings.batch_size, order)):
            ids, mask, labels = _batch(rows, settings.device)
            loss = F.cross_entropy(model(ids, mask), labels, weights)
            if not bool(loss.isfinite()):
                raise UserError(f"epoch {epoch + 1}: the loss is {loss.item()}; lower --lr")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
            progress(epoch + 1, done + 1, batches, history[best].accuracy if best >= 0 else 0.0)
        losses.append(total / len(train))
        history.append(score(model, valid, len(task.classes), settings.batch_size))
        if best < 0 or _rank(history[-1]) > _rank(history[best]):
            best = epoch
            kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        elif epoch - best >= settings.patience:
            break
    model.load_state_dict(kept)
    return Trained(score(model, test, len(task.classes), settings.batch_size), history, losses, best + 1)


Row = tuple[list[int], int]


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[Row], classes: int, batch_size: int) -> Scores:
    """Scores of a model over encoded rows."""
    model.eval()
    device = next(model.parameters()).device
    predicted, actual, loss = [], [], 0.0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for begin in range(0, len(ordered), batch_size):
        ids, mask, labels = _batch(ordered[begin : begin + batch_size], device)
        logits = model(ids, mask)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        predicted += logits.argmax(1).tolist()
        actual += labels.tolist()
    accuracy, f1 = accuracy_and_f1(predicted, actual, classes)
    return Scores(accuracy, f1, loss / len(rows))


def accuracy_and_f1(predicted: Sequence[int], actual: Sequence[int], classes: int) -> tuple[float, float]:
    """Share of right predictions, and the mean over classes of F1 = 2 hits / (predicted + actual).

    A class that is neither predicted nor there counts as 0.
    """
    hits = Counter(p for p, a in zip(predicted, actual, strict=True) if p == a)
    guesses, truths = Counter(predicted), Counter(actual)
    f1 = [2 * hits[c] / max(1, guesses[c] + truths[c]) for c in range(classes)]
    return sum(hits.values()) / len(actual), sum(f1) / classes


def class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """(classes,) float32: N / (classes * count), so that each class weighs the same in the loss's sum."""
    counts = Counter(labels)
    return torch.tensor([len(labels) / (classes * counts[c]) for c in range(classes)])


def _rank(scores: Scores) -> tuple[float, float]:
    return scores.accuracy, -scores.loss


def _encoded(examples: Examples, encode: Encoder, most: int) -> list[Row]:
    rows = zip(encode(examples.texts), examples.labels, strict=True)
    return [(ids[:most], label) for ids, label in rows]


def _batch(rows: Sequence[Row], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, T), padded with 0 on the right, mask (B, T), labels (B,)."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, (row, _) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    labels = torch.tensor([label for _, label in rows])
    return ids.to(device), mask.to(device), labels.to(device)


def _shuffled(rows: list[Row], size: int, generator: torch.Generator) -> Iterator[list[Row]]:
    """Batches of all rows in a new order, each of texts of like length, so that little is padding."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    batches: list[list[Row]] = []
    for begin in range(0, len(order), size * _POOL):
        pool = sorted(order[begin : begin + size * _POOL], key=lambda index: len(rows[index][0]))
        batches += [[rows[i] for i in pool[at : at + size]] for at in range(0, len(pool), size)]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[index]


def _optimizer(model: nn.Module, settings: ClassifySettings) -> torch.optim.Optimizer:
    """AdamW; the classification head has a rate of its own, and only matrices decay.

    The body of a model with `width_transfer` has the rates and decays that it has in pretraining.
    """
    named = list(model.named_parameters())
    head = [(n, p) for n, p in named if n.startswith("classifier.")]
    body = [(n, p) for n, p in named if not n.startswith("classifier.")]
    plain = ModelConfig()  # of networks that are no SpikeGPT, and of the head
    config = model.spikegpt.config if isinstance(model, SpikeClassifier) else plain
    groups = []
    for rate, members, kind in ((settings.lr, body, config), (settings.head_lr, head, plain)):
        for group in parameter_groups(members, kind, settings.weight_decay):
            group["lr"] = rate * group.get("lr_scale", 1.0)
            groups.append(group)
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def _factor(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, steps - warmup)
