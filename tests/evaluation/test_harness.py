"""lm-evaluation-harness with local tasks: its figures are those of the model asked directly."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.model import SpikeGPT
from spikescale.model.store import LoadedModel, load_model_folder, save_model_folder

EOS = 255
COLOURS = ("red", "green", "blue")
HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
metadata: {{version: 1}}
"""
CHOICE = """
task: my_choice
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
ROLLING = """
task: my_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
GENERATE = """
task: my_generation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@torch.no_grad()
def nats(model: SpikeGPT, context: str, continuation: str) -> float:
    ids = torch.tensor([[EOS, *context.encode(), *continuation.encode()]])
    logits, _ = model(ids[:, :-1])
    losses = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    return float(losses[len(context.encode()) :].double().sum())


@torch.no_grad()
def greedy(model: SpikeGPT, context: str, count: int) -> bytes:
    ids = [EOS, *context.encode()]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return bytes(ids[1 + len(context.encode()) :])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("models") / "random"
    config = ModelConfig(layers=2, width=16, vocab_size=256, context_length=1024)
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
        for name, p in SpikeGPT(config).named_parameters()
    }
    # Text and not half characters: bytes from 128 on are never the most probable.
    weights["head.weight"][128:] *= 0.01
    save_model_folder(folder, weights, config, make_tokenizer("byte"), {})
    return load_model_folder(folder)


@pytest.fixture(scope="module")
def items(loaded: LoadedModel) -> list[dict[str, Any]]:
    questions = [f"Question {number}: what is it that spikes {'so ' * number}often?" for number in range(6)]
    found = []
    for number, question in enumerate(questions):
        text = greedy(loaded.model, question, 12).decode().split("e")[0]
        found.append(
            {
                "question": question,
                "choices": list(COLOURS),
                "gold": number % 3,
                "answer": text if number % 2 else text + "!",
            }
        )
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, items: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generation", GENERATE)):
        (folder / f"{name}.yaml").write_text(HEAD.format(data=data) + text)
    return folder


def test_figures_of_local_tasks_are_those_of_the_model_asked_directly(loaded, items, tasks, capsys):
    names = "my_choice,my_rolling,my_generation"
    words = [
        "evaluate",
        str(loaded.folder),
        "--tasks",
        names,
        "--include-path",
        str(tasks),
        "--batch-size",
        "4",
    ]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    chosen = []
    for item in items:
        costs = [nats(loaded.model, item["question"] + " Answer:", " " + choice) for choice in COLOURS]
        chosen.append(costs.index(min(costs)) == item["gold"])
    assert shown["tasks"]["my_choice"]["acc"] == pytest.approx(sum(chosen) / 6)
    total = sum(nats(loaded.model, "", item["question"]) for item in items)
    size = sum(len(item["question"]) for item in items)
    words_in_all = sum(len(item["question"].split()) for item in items)
    rolling = shown["tasks"]["my_rolling"]
    assert rolling["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert rolling["word_perplexity"] == pytest.approx(math.exp(total / words_in_all), rel=1e-4)
    assert shown["tasks"]["my_generation"]["exact_match"] == pytest.approx(0.5)
    assert shown["items"] == {"my_choice": 6, "my_rolling": 6, "my_generation": 6}
    assert shown["versions"] == dict.fromkeys(names.split(","), 1)


def test_examples_in_front_and_limits_reach_the_task(loaded, tasks, capsys):
    from spikescale.evaluation.harness import evaluate_tasks

    found = evaluate_tasks(loaded, ["my_choice"], num_fewshot=2, limit=3, include_path=tasks)
    assert (found["fewshot"], found["items"]) == ({"my_choice": 2}, {"my_choice": 3})


def test_an_unknown_task_is_refused_with_what_is_near(loaded, tasks, monkeypatch):
    from spikescale.evaluation import harness

    # Without the harness's own ten thousand tasks, which take seconds to list.
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    with pytest.raises(UserError, match=r"--tasks my_choise: .* did you mean my_choice"):
        harness.evaluate_tasks(loaded, ["my_choise"], include_path=tasks)
    with pytest.raises(UserError, match=r"--include-path .*: no such folder"):
        harness.evaluate_tasks(loaded, ["my_choice"], include_path=tasks / "none")


def test_requests_by_hand(loaded):
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows

    from spikescale.evaluation.harness import HarnessModel

    def ask(kind: str, *arguments: tuple) -> list[Any]:
        requests = [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]
        return getattr(model, kind)(requests)

    model, long = HarnessModel(loaded, 2), "spikes and rests, " * 30
    answers = ask("loglikelihood", ("", "first"), (long, "then"), ("a ", "b"))
    expected = [("", "first"), (long.rstrip(), " then"), ("a", " b")]
    assert [value for value, _ in answers] == pytest.approx(
        [-nats(loaded.model, *pair) for pair in expected], rel=1e-5
    )
    assert ask("loglikelihood_rolling", (long,), ("",)) == [
        pytest.approx(-nats(loaded.model, "", long), rel=1e-5),
        0,
    ]
    # A window of 16 tokens: those that the harness itself cuts a rolling text into.
    model = HarnessModel(loaded, 2, window=16)
    text, total = long[:70], 0.0
    for read, wanted in get_rolling_token_windows(list(text.encode()), EOS, 16, 1):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([read]))[0][0, -len(wanted) :]
        total -= float(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted), reduction="sum"))
    assert ask("loglikelihood_rolling", (text,)) == [pytest.approx(total, rel=1e-5)]
    # Whatever the batch, each context is continued as alone; half a word is no stop text.
    model = HarnessModel(loaded, 3)
    plain = {"max_gen_toks": 9}
    contexts = ["one", "another one", long, "and more of it"]
    texts = ask("generate_until", *((context, plain) for context in contexts))
    assert texts == [greedy(loaded.model, context, 9).decode() for context in contexts]
    stop = texts[2][3:5]
    (cut,) = ask("generate_until", (long, {**plain, "until": [stop]}))
    assert cut == texts[2][: texts[2].index(stop)]
    with pytest.raises(UserError, match="generation_kwargs num_beams: not known"):
        ask("generate_until", ("a", {"num_beams": 4}))
