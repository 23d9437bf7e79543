"""Continuations are scored as if alone, whatever is batched, padded or shared."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.evaluation.last_word import evaluate_last_word, last_word, split_ids
from spikescale.evaluation.scoring import Scorer
from spikescale.model import SpikeGPT

EOS = 255


def random_model(**changes: object) -> SpikeGPT:
    config = ModelConfig(layers=2, width=16, vocab_size=260, **changes)
    model = SpikeGPT(config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> SpikeGPT:
    return random_model()


@torch.no_grad()
def alone(model, context, continuation, window=None) -> tuple[float, bool]:
    """One request in one pass of its own: every token from all before it."""
    ids = [EOS, *context, *continuation]
    if window is not None:
        ids = ids[-(max(window, len(continuation)) + 1) :]
    logits, _ = model(torch.tensor([ids[:-1]]))
    own = logits[0, -len(continuation) :, :256].double().log_softmax(-1)
    wanted = torch.tensor(continuation)
    return float(own.gather(-1, wanted[:, None]).sum()), bool((own.argmax(-1) == wanted).all())


def some_requests(shared: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(4)
    few_shot = rng.integers(0, 250, shared).tolist()
    contexts = [few_shot + rng.integers(0, 250, length).tolist() for length in (0, 3, 9, 9, 17)]
    return [
        (context, rng.integers(0, 250, length).tolist()) for context in contexts for length in (1, 4, 1, 6)
    ]


@pytest.mark.parametrize("shared", [0, 60])
@pytest.mark.parametrize(("batch", "window"), [(1, None), (4, None), (64, 12)])
def test_scores_are_those_of_alone(model, shared, batch, window):
    requests = some_requests(shared)
    done: list[int] = []
    scores = Scorer(model, EOS, 256, batch, window).score(requests, done.append)
    assert sum(done) == len(requests)
    for (context, continuation), score in zip(requests, scores, strict=True):
        expected, greedy = alone(model, context, continuation, window)
        assert score.log_probability == pytest.approx(expected, abs=2e-4)
        assert score.is_greedy == greedy


@pytest.mark.parametrize("variant", ["rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt-driven"])
def test_every_variant_is_scored_exactly(variant):
    model = random_model(variant=variant, binary_embedding=variant != "rwkv", reset_at_documents=True)
    requests = some_requests(20)[5:14]
    for (context, continuation), score in zip(
        requests, Scorer(model, EOS, 256, 3).score(requests), strict=True
    ):
        assert score.log_probability == pytest.approx(alone(model, context, continuation)[0], abs=2e-4)


def test_what_contexts_share_is_read_once(model):
    few_shot = list(range(200))
    requests = [([*few_shot, 7, number], [1]) for number in range(8)]
    scorer = Scorer(model, EOS, 256, batch_size=8)
    scorer.score(requests)
    assert scorer.tokens_read == 202 + 8  # the end of a document, the examples and a 7; then one token each
    again = Scorer(model, EOS, 256, batch_size=8)
    again.score([(few_shot, [number]) for number in range(20)])
    assert again.tokens_read == 201  # one context, and single tokens need no pass of their own


def test_a_greedy_continuation_is_known_as_such(model):
    context = [5, 6, 7]
    ids = [EOS, *context]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1, :256].argmax()))
    (score, other) = Scorer(model, EOS, 256).score([(context, ids[4:]), (context, [*ids[4:6], 0])])
    assert (score.is_greedy, other.is_greedy) == (True, False)


def test_last_words_by_the_usual_definition(model):
    tokenizer = make_tokenizer("byte")
    passages = ["the spike came from the neuron\n", "one two", "a longer passage that ends in rest"]
    done: list[int] = []
    result = evaluate_last_word(Scorer(model, EOS, 256), tokenizer, passages, done.append)
    nats = 0.0
    for passage in passages:
        context, _, word = passage.strip().rpartition(" ")
        nats -= alone(model, list(context.encode()), list((" " + word).encode()))[0]
    assert result.last_word_perplexity == pytest.approx(math.exp(nats / 3), rel=1e-3)
    assert result.last_word_accuracy == 0
    assert (result.passages, result.tokens, sum(done)) == (3, len(" neuron two rest"), 3)
    assert last_word("a b c. ") == ("a b", " c.")
    assert split_ids(tokenizer, "a ", "b") == ([97], [32, 98])
    for passage in ("word", " word"):
        with pytest.raises(UserError, match="no words before"):
            evaluate_last_word(Scorer(model, EOS, 256), tokenizer, [passage])
    with pytest.raises(UserError, match="no passages"):
        evaluate_last_word(Scorer(model, EOS, 256), tokenizer, [])


def test_the_command_reads_passages_a_line_or_a_record(model, tmp_path: Path, capsys):
    import json

    from spikescale.cli.main import main
    from spikescale.model.store import save_model_folder

    weights = dict(model.named_parameters())
    save_model_folder(tmp_path / "model", weights, model.config, make_tokenizer("byte"), {})
    lines = ["the spike came from", "one two three", "left out"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    shown = []
    for name in ("a.txt", "b.jsonl"):
        words = [
            "evaluate",
            str(tmp_path / "model"),
            "--lambada",
            str(tmp_path / name),
            "--limit",
            "2",
            "--json",
        ]
        assert main(words) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0]["last_word_perplexity"] == shown[1]["last_word_perplexity"]
    assert (shown[0]["passages"], shown[0]["tokens"]) == (2, len(" from three"))
