"""Classification: what is learnt and what is measured, resumed where it stopped, saved for transformers."""

import json
import random
import time
from pathlib import Path

import pytest
import torch

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.errors import UserError
from spikescale.finetune import contenders as kinds
from spikescale.finetune.classifiers import LSTMClassifier, SpikeClassifier, TextCNN, WordVocabulary
from spikescale.finetune.classify import (
    ClassifySettings,
    accuracy_and_f1,
    class_weights,
    score,
    train_classifier,
)
from spikescale.finetune.comparison import compare
from spikescale.finetune.labelled import Labelled, labelled
from spikescale.model import SpikeGPT

GOOD, BAD = ("fine", "lovely", "superb", "great"), ("dull", "awful", "boring", "weak")
FILLER = ("the", "film", "was", "plot", "and", "acting", "a", "very")


def reviews(count: int = 160, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of which one word tells the class, wherever it stands."""
    drawn = random.Random(seed)
    rows = []
    for number in range(count):
        words = [drawn.choice(FILLER) for _ in range(drawn.randint(2, 9))]
        label = "good" if number % 2 else "bad"
        words.insert(drawn.randint(0, len(words)), drawn.choice(GOOD if label == "good" else BAD))
        rows.append((" ".join(words), label))
    return rows


@pytest.fixture(scope="module")
def task() -> Labelled:
    return labelled("reviews", reviews())


def words_task_models(words: int) -> dict[str, torch.nn.Module]:
    config = ModelConfig(layers=1, width=24, vocab_size=words, context_length=32)
    return {
        "spikegpt": SpikeClassifier(SpikeGPT(config), 2),
        "lstm": LSTMClassifier(words, 2, 24),
        "textcnn": TextCNN(words, 2, 24, 12),
    }


@pytest.mark.parametrize("kind", ["spikegpt", "lstm", "textcnn"])
def test_padding_and_the_other_texts_of_a_batch_change_no_logits(task, kind):
    torch.manual_seed(0)
    words = WordVocabulary(task.train.texts)
    model = words_task_models(len(words))[kind].eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        rows = words(["a dull film", "superb", "the plot was very great and the acting was a very fine"])
        alone = torch.cat([model(torch.tensor([row]), torch.ones(1, len(row), dtype=int)) for row in rows])
        ids = torch.full((3, 14), 5)
        mask = torch.zeros(3, 14, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
        torch.testing.assert_close(model(ids, mask), alone, rtol=1e-4, atol=1e-5)
    assert alone.std(0).min() > 1e-3


@pytest.mark.parametrize("kind", ["spikegpt", "lstm", "textcnn"])
def test_what_words_tell_is_learnt(task, kind):
    torch.manual_seed(1)
    words = WordVocabulary(task.train.texts)
    model = words_task_models(len(words))[kind]
    settings = ClassifySettings(epochs=25, patience=25, batch_size=16, lr=1e-2, head_lr=1e-2)
    trained = train_classifier(model, words, task, settings, seed=0)
    assert trained.test.accuracy >= 0.9
    assert trained.train_loss[-1] < 0.5 * trained.train_loss[0]
    # Of the best accuracy, and among equals of the lowest loss.
    best = max(range(len(trained.valid)), key=lambda i: (trained.valid[i].accuracy, -trained.valid[i].loss))
    assert trained.best_epoch == best + 1


def test_training_stops_when_validation_stops_rising():
    """A third of the labels are wrong: what is learnt of them by heart makes validation worse."""
    drawn = random.Random(2)
    rows = [(text, drawn.choice([label, label, "good", "bad"])) for text, label in reviews(200)]
    noisy = labelled("noisy", rows)
    words = WordVocabulary(noisy.train.texts)
    lengths = []
    for patience in (2, 6):
        torch.manual_seed(0)
        model = words_task_models(len(words))["textcnn"]
        settings = ClassifySettings(epochs=40, patience=patience, batch_size=16, lr=2e-2, head_lr=2e-2)
        trained = train_classifier(model, words, noisy, settings, seed=0)
        lengths.append(len(trained.valid))
        assert len(trained.valid) == trained.best_epoch + patience < 40
        # The model has the weights of its best epoch, which was not the last one.
        encoded = list(zip(words(noisy.valid.texts), noisy.valid.labels, strict=True))
        loss = score(model, encoded, 2, 16).loss
        assert loss == pytest.approx(trained.valid[trained.best_epoch - 1].loss)
        assert loss != pytest.approx(trained.valid[-1].loss)
    assert lengths[0] < lengths[1]


def test_scores_are_accuracy_and_mean_f1():
    # Class 0: one hit of two guesses and one truth; class 1: none of one and two; class 2 is nowhere.
    accuracy, f1 = accuracy_and_f1([0, 0, 1], [0, 1, 1], 3)
    assert accuracy == pytest.approx(2 / 3)
    assert f1 == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    from sklearn.metrics import f1_score

    drawn = random.Random(0)
    guesses, truths = ([drawn.randint(0, 3) for _ in range(50)] for _ in "gt")
    expected = f1_score(truths, guesses, average="macro")
    assert accuracy_and_f1(guesses, truths, 4)[1] == pytest.approx(expected)


def test_balanced_weights_give_every_class_the_same_say():
    weights = class_weights([0, 0, 0, 1], 2)
    assert weights.tolist() == pytest.approx([4 / 6, 4 / 2])
    rows = reviews(600)
    rare = labelled("rare", [row for number, row in enumerate(rows) if row[1] == "good" or number % 20 == 0])
    words = WordVocabulary(rare.train.texts)
    found = {}
    for kind in ("none", "balanced"):
        torch.manual_seed(0)
        settings = ClassifySettings(epochs=3, batch_size=16, class_weights=kind)  # type: ignore[arg-type]
        model = words_task_models(len(words))["textcnn"]
        found[kind] = train_classifier(model, words, rare, settings, seed=0).test.macro_f1
    assert found["none"] < 0.5 < found["balanced"]


def test_words_that_occur_once_are_unknown():
    words = WordVocabulary(["The plot, the film", "the plot isn't"])
    assert words(["THE plot film", "", "isn't"]) == [[2, 3, 1], [1], [1]]
    assert len(words) == 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A comparison of everything, by the command line."""
    folder = tmp_path_factory.mktemp("classify")
    data = folder / "reviews.csv"
    data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in reviews()))
    words = ["classify", str(data), "--output", str(folder / "out"), "--seeds", "2", "--layers", "1"]
    words += ["--width", "16", "--epochs", "3", "--batch-size", "16", "--lr", "1e-2"]
    assert main([*words, "--save", str(folder / "saved")]) == 0
    return folder, folder / "out", words


def test_one_table_has_the_model_and_all_baselines(finished):
    _, out, _ = finished
    summary = json.loads((out / "classification.json").read_text())
    names = [row["name"] for row in summary["rows"]]
    expected = ["spikegpt, new", "majority", "TF-IDF + logistic regression", "LSTM", "TextCNN", "rwkv, new"]
    assert names == expected
    rows = {row["name"]: row for row in summary["rows"]}
    assert len(rows["majority"]["accuracy"]["seeds"]) == 1
    assert rows["majority"]["accuracy"]["deviation"] is None
    assert rows["TF-IDF + logistic regression"]["accuracy"]["mean"] > 0.9
    spiking = rows["spikegpt, new"]
    values = list(spiking["accuracy"]["seeds"].values())
    assert len(values) == 2 and spiking["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert spiking["accuracy"]["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert rows["rwkv, new"]["parameters"] == spiking["parameters"]
    assert rows["rwkv, new"]["settings"]["config"]["variant"] == "rwkv"
    table = (out / "classification.md").read_text()
    assert table.startswith("reviews: 130 training, 14 validation and 16 test texts, 2 classes")
    assert sum(line.startswith("| ") for line in table.splitlines()) == 7
    assert (out / "classification.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_run_again_unless_it_would_differ(finished, monkeypatch, capsys):
    _, out, words = finished
    before = {file.name: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    assert len(before) == 2 * 4 + 2
    (out / "runs" / "lstm-seed1.json").unlink()
    time.sleep(0.01)
    assert main(words) == 0
    after = {file.name: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"lstm-seed1.json"}
    capsys.readouterr()
    assert main([*words, "--lr", "2e-2", "--baselines", "none"]) == 0
    again = {file.name: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    changed = {name for name in again if again[name] != after[name]}
    assert changed == {"spikegpt-new-seed0.json", "spikegpt-new-seed1.json"}


def test_the_saved_classifier_answers_in_transformers_pipeline(finished):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("spikescale.interop.hf")
    folder, _, _ = finished
    classify = transformers.pipeline("text-classification", model=str(folder / "saved"), device="cpu")
    answers = classify(["a superb film", "dull"], batch_size=2)
    assert {answer["label"] for answer in answers} <= {"good", "bad"}
    assert (folder / "saved" / "tokenizer" / "spikescale_tokenizer.json").is_file()


def test_saving_takes_the_spiking_contender_and_survives_a_stop(tmp_path, capsys):
    pytest.importorskip("spikescale.interop.hf")
    data, out, saved = tmp_path / "r.csv", tmp_path / "out", tmp_path / "saved"
    data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in reviews(60)))
    words = ["classify", str(data), "--output", str(out), "--seeds", "1", "--layers", "1", "--width", "16"]
    words += ["--epochs", "1", "--baselines", "rwkv"]
    assert main(words) == 0
    runs = out / "runs"
    ours, rwkv = runs / "spikegpt-new-seed0.json", runs / "rwkv-new-seed0.json"
    before = json.loads(ours.read_text())
    # Only the figures of the contender are kept, and the baseline is what would be new.
    rwkv.unlink()
    assert main([*words, "--save", str(saved)]) == 0
    config = json.loads((saved / "config.json").read_text())
    assert config["spikescale"]["variant"] == "spikegpt"
    assert rwkv.is_file() and json.loads(ours.read_text())["test"] == before["test"]
    # Stopped after it was saved: the same command goes on, and leaves the folder alone.
    rwkv.unlink()
    times = {file: file.stat().st_mtime_ns for file in (ours, saved / "model.safetensors")}
    assert main([*words, "--save", str(saved)]) == 0
    assert rwkv.is_file() and all(file.stat().st_mtime_ns == time for file, time in times.items())
    capsys.readouterr()
    # The folder of another run, or of something else, is not overwritten.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    for options, complaint in (
        (["--save", str(saved), "--lr", "2e-3"], "saved: already exists"),
        (["--save", str(tmp_path / "other")], "other: already exists"),
        (["--save", str(tmp_path / "new"), "--new", "rwkv"], "there is no spiking contender"),
    ):
        assert main([*words, *options]) == 2
        assert complaint in capsys.readouterr().err
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_a_pretrained_model_is_trained_further(tmp_path, task):
    from spikescale.data_pipeline.tokenizers import make_tokenizer
    from spikescale.model.store import save_model_folder

    config = ModelConfig(layers=1, width=16, vocab_size=256, context_length=32)
    model = SpikeGPT(config, seed=3)
    weights = dict(model.named_parameters())
    save_model_folder(tmp_path / "m", weights, config, make_tokenizer("byte"), {"step": 5})
    contender = kinds.pretrained(tmp_path / "m", ClassifySettings(epochs=1, lr=1e-9, head_lr=1e-9))
    result = contender.run(task, 0, lambda *values: None)
    assert contender.name == "spikegpt, pretrained"
    assert contender.described["info"] == {"step": 5}
    kept = dict(result.model.spikegpt.named_parameters())
    assert torch.equal(kept["embedding.weight"].sign(), weights["embedding.weight"].sign())
    torch.testing.assert_close(
        kept["blocks.0.channel_mix.key.weight"], weights["blocks.0.channel_mix.key.weight"]
    )
    summary = compare(task, kinds.one_of_a_kind([contender, contender]), [0], tmp_path / "out")
    assert [row["name"] for row in summary["rows"]] == ["spikegpt, pretrained", "spikegpt, pretrained (2)"]


def test_bodies_with_width_transfer_have_the_rates_of_their_pretraining():
    from spikescale.finetune.classify import _optimizer

    config = ModelConfig(layers=1, width=32, vocab_size=40, context_length=32, width_transfer=8)
    model = SpikeClassifier(SpikeGPT(config), 2)
    optimizer = _optimizer(model, ClassifySettings(lr=1e-3, head_lr=5e-3, weight_decay=0.1))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group, matrix = groups[id(parameter)], parameter.ndim > 1
        rate = 5e-3 if name.startswith("classifier.") else 1e-3
        if name.startswith("spikegpt.") and name != "spikegpt.embedding.weight" and matrix:
            rate = 1e-3 * 8 / 32
        decay = 0.1 * (4 if rate == 1e-3 * 8 / 32 else 1) if matrix else 0.0
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(rate), pytest.approx(decay)), name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--seeds", "0"], "--seeds 0: must be 1 or more"),
        (["--baselines", "lstm,bert"], "--baselines bert: must be of majority, tfidf, lstm, textcnn, rwkv"),
        (["--epochs", "0"], "--epochs 0: must be above 0"),
        (["--tokenizer", "words"], "tokenizer 'words'"),
        (["--layers", "-1"], "layers = -1"),
        (["--model", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, options, complaint):
    assert main(["classify", "vader-movies", "--output", str(tmp_path / "out"), *options]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_training(task):
    words = WordVocabulary(task.train.texts)
    model = words_task_models(len(words))["lstm"]
    with torch.no_grad():
        model.out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="epoch 1: the loss is nan; lower --lr"):
        train_classifier(model, words, task, ClassifySettings(epochs=1), seed=0)
