"""What is compared on a classification task, each by its name, its settings and a function that runs it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.files import read_json
from spikescale.finetune.classifiers import Encoder, LSTMClassifier, SpikeClassifier, TextCNN, WordVocabulary
from spikescale.finetune.classify import (
    ClassifySettings,
    Scores,
    Trained,
    accuracy_and_f1,
    train_classifier,
)
from spikescale.finetune.labelled import Labelled

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer

BASELINES = ("majority", "tfidf", "lstm", "textcnn", "rwkv")
Progress = Callable[[int, int, int, float], None]
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of logistic regression's C, chosen on the validation split


@dataclass(frozen=True)
class Result:
    """One run: scores on the test split, how the validation split's went, and what the model was."""

    trained: Trained
    parameters: int
    chosen: dict[str, Any]
    model: nn.Module | None = None
    tokenizer: "Tokenizer | None" = None


@dataclass(frozen=True)
class Contender:
    """A way to classify.

    Attributes:
        name: in tables; one of a kind in a comparison.
        seeded: whether a seed changes anything; otherwise it runs once.
        described: all that decides its results beside task and seed, as JSON.
        run: from task, seed and progress to the result.
        variant: of SpikeGPT; None: another method.
    """

    name: str
    seeded: bool
    described: dict[str, Any]
    run: Callable[[Labelled, int, Progress], Result]
    variant: str | None = None

    @property
    def is_spiking(self) -> bool:
        """Whether it is a SpikeGPT with neurons."""
        return self.variant not in (None, "rwkv")


def majority() -> Contender:
    """The commonest class of the training texts, always."""

    def run(task: Labelled, seed: int, progress: Progress) -> Result:
        labels = task.train.labels
        common = max(range(len(task.classes)), key=labels.count)
        scores = accuracy_and_f1([common] * len(task.test), task.test.labels, len(task.classes))
        return Result(
            Trained(Scores(*scores, loss=float("nan")), [], [], 0), 0, {"class": task.classes[common]}
        )

    return Contender("majority", False, {}, run)


def tfidf(settings: ClassifySettings) -> Contender:
    """Words and pairs of them weighed by TF-IDF, and logistic regression (scikit-learn).

    Its strength is chosen on the validation split. Raises UserError where scikit-learn is missing.
    """
    try:
        import sklearn
    except ImportError:
        raise UserError("baseline tfidf: needs scikit-learn: pip install 'spikescale[classify]'") from None

    def run(task: Labelled, seed: int, progress: Progress) -> Result:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss

        vectors = TfidfVectorizer(
            ngram_range=(1, 2),
            min_df=2,
            sublinear_tf=True,
            tokenizer=WordVocabulary.words,
            token_pattern=None,
        )
        train = vectors.fit_transform(task.train.texts)
        splits = {name: vectors.transform(getattr(task, name).texts) for name in ("valid", "test")}
        balanced = "balanced" if settings.class_weights == "balanced" else None

        def scores(model: Any, split: str) -> Scores:
            actual = getattr(task, split).labels
            found = accuracy_and_f1(model.predict(splits[split]).tolist(), actual, len(task.classes))
            chances = model.predict_proba(splits[split])
            return Scores(*found, loss=float(log_loss(actual, chances, labels=model.classes_)))

        models = []
        for index, strength in enumerate(_STRENGTHS):
            model = LogisticRegression(C=strength, max_iter=2000, class_weight=balanced)
            models.append(model.fit(train, task.train.labels))
            progress(1, index + 1, len(_STRENGTHS), 0.0)
        history = [scores(model, "valid") for model in models]
        best = max(range(len(models)), key=lambda i: (history[i].accuracy, -history[i].loss))
        chosen = {"C": _STRENGTHS[best], "features": train.shape[1]}
        trained = Trained(scores(models[best], "test"), history, [], best + 1)
        return Result(trained, train.shape[1] * max(1, len(models[best].coef_)), chosen)

    described = {"scikit-learn": sklearn.__version__, "class_weights": settings.class_weights}
    return Contender("TF-IDF + logistic regression", False, described, run)


def word_network(kind: str, settings: ClassifySettings) -> Contender:
    """`lstm` or `textcnn` over word vectors that are learnt with it."""
    build: Callable[[int, int], nn.Module]
    title, build = {"lstm": ("LSTM", LSTMClassifier), "textcnn": ("TextCNN", TextCNN)}[kind]

    def run(task: Labelled, seed: int, progress: Progress) -> Result:
        torch.manual_seed(seed)
        words = WordVocabulary(task.train.texts)
        model = build(len(words), len(task.classes))
        trained = train_classifier(model, words, task, settings, seed, progress)
        return Result(trained, _count(model), {"words": len(words)})

    return Contender(title, True, settings.as_dict(), run)


def from_scratch(
    config: ModelConfig,
    tokenizer: "Callable[[Sequence[str]], Tokenizer]",
    spec: str,
    settings: ClassifySettings,
) -> Contender:
    """A new model of this shape and variant; `tokenizer` makes its tokenizer of the training texts."""

    def run(task: Labelled, seed: int, progress: Progress) -> Result:
        from spikescale.model import SpikeGPT

        made = tokenizer(task.train.texts)
        sized = config.model_copy(update={"vocab_size": made.vocab_size})
        torch.manual_seed(seed)
        model = SpikeClassifier(SpikeGPT(sized, seed=seed), len(task.classes))
        trained = train_classifier(model, _encoder(made), task, settings, seed, progress)
        return Result(trained, _count(model), {"vocabulary": made.vocab_size}, model, made)

    described = {"config": config.model_dump(mode="json"), "tokenizer": spec, **settings.as_dict()}
    return Contender(f"{config.variant}, new", True, described, run, config.variant)


def pretrained(path: Path, settings: ClassifySettings) -> Contender:
    """The model that a run, a checkpoint or a folder holds, all of it trained further. Raises UserError."""
    from spikescale.model.store import SETTINGS, find_model_folder, load_model_folder

    folder = find_model_folder(path)
    loaded = load_model_folder(folder)
    variant = loaded.config.variant

    def run(task: Labelled, seed: int, progress: Progress) -> Result:
        again = load_model_folder(folder, verify=False)
        torch.manual_seed(seed)
        model = SpikeClassifier(again.model, len(task.classes))
        trained = train_classifier(model, _encoder(again.tokenizer), task, settings, seed, progress)
        return Result(trained, _count(model), {}, model, again.tokenizer)

    weights = read_json(folder / SETTINGS)["weights_sha256"]
    described = {"weights": weights, "info": loaded.info, **settings.as_dict()}
    if loaded.config.width_transfer is not None:  # muP: it scales the rates
        described["width_transfer"] = loaded.config.width_transfer
    return Contender(f"{variant}, pretrained", True, described, run, variant)


def twin(config: ModelConfig) -> ModelConfig:
    """The identical model without neurons: variant rwkv of the same shape."""
    changes = {"variant": "rwkv", "binary_embedding": False, "neuron": {}}
    return ModelConfig.model_validate({**config.model_dump(), **changes})


def one_of_a_kind(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders, numbered where two have the same name."""
    named: list[Contender] = []
    for contender in contenders:
        count = sum(other.name == contender.name for other in contenders[: len(named)])
        named.append(replace(contender, name=f"{contender.name} ({count + 1})") if count else contender)
    return named


def _encoder(tokenizer: "Tokenizer") -> Encoder:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        # A text of which nothing is left, if there can be one, is the end of a document.
        return [ids or [tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]

    return encode


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
