"""A trained classifier as a folder for transformers (docs/interoperability.md)."""

from pathlib import Path
from typing import Any

from spikescale import files
from spikescale.errors import UserError
from spikescale.finetune.classifiers import SpikeClassifier
from spikescale.finetune.contenders import Result
from spikescale.finetune.labelled import Labelled
from spikescale.model.store import TOKENIZER, folder_aside, refuse_occupied

RUN_FILE = "spikescale_run.json"


def is_saved(folder: Path, run: dict[str, Any]) -> bool:
    """Whether `folder` holds the classifier of this run. Raises UserError where it holds anything else."""
    file = folder / RUN_FILE
    if file.is_file() and files.read_json(file) == run:
        return True
    refuse_occupied(folder)
    return False


def save_classifier(result: Result, task: Labelled, folder: Path, run: dict[str, Any]) -> None:
    """Write the model of `result` as a SpikeGPTForSequenceClassification, with class names and tokenizer.

    `run` says what it is the result of (`is_saved`). Raises UserError for a result without such a model,
    where transformers is missing, and when `folder` already holds something.
    """
    if not isinstance(result.model, SpikeClassifier) or result.tokenizer is None:
        raise UserError("--save: only SpikeGPT classifiers can be saved")
    try:
        from spikescale.interop.hf import SpikeGPTConfig, SpikeGPTForSequenceClassification
        from spikescale.interop.hf.tokenizer import to_transformers
    except ImportError:
        raise UserError("--save: needs transformers: pip install 'spikescale[hf]'") from None
    classifier, eos = result.model, result.tokenizer.eos_id
    names = dict(enumerate(task.classes))
    config = SpikeGPTConfig.from_model_config(
        classifier.spikegpt.config,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        classifier_dropout=classifier.classifier.dropout,
        pad_token_id=eos,
        eos_token_id=eos,
        dtype="float32",
    )
    classifier.cpu()
    model = SpikeGPTForSequenceClassification(config)
    model.backbone.spikegpt.load_state_dict(classifier.spikegpt.state_dict())
    model.classifier.load_state_dict(classifier.classifier.state_dict())
    tokenizer = to_transformers(result.tokenizer)
    with folder_aside(folder) as aside:
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        result.tokenizer.save(aside / TOKENIZER)
        files.write_json(aside / RUN_FILE, run)
