"""The tasks of lm-evaluation-harness, answered by a model of this project.

Import it only where tasks are asked for: `lm_eval` takes seconds to import.
"""

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from spikescale.errors import UserError
from spikescale.evaluation.language_model import evaluate_tokens
from spikescale.evaluation.last_word import split_ids
from spikescale.evaluation.scoring import Scorer, batches
from spikescale.inference.generate import choose_decoder, stepper
from spikescale.inference.sampling import SamplingSettings, choose

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer
    from spikescale.model.store import LoadedModel

MAX_TOKENS = 256  # generated where a task does not say how many
BOOTSTRAP = 1000  # resamplings for the standard error of figures that have no formula for it


class HarnessModel(LM):
    """What lm-evaluation-harness asks of a model.

    Args:
        loaded: model and tokenizer.
        batch_size: contexts, continuations and windows computed together.
        window: tokens that are read at most, as by a model with a limited context (longer contexts lose their
            beginning, rolling texts are cut into windows, the last one as long as the others); None:
            everything, the state carried.
        progress: show bars.
    """

    def __init__(
        self, loaded: "LoadedModel", batch_size: int = 8, window: int | None = None, progress: bool = False
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = loaded.model.eval(), loaded.tokenizer
        self.batch_size, self.window, self._progress = batch_size, window, progress
        self._device = next(loaded.model.parameters()).device
        self.scorer = Scorer(
            loaded.model, loaded.tokenizer.eos_id, loaded.tokenizer.vocab_size, batch_size, window
        )

    @property
    def tokenizer_name(self) -> str:
        """Identifies what encodes the requests."""
        return f"spikescale-{self.tokenizer.kind}-{self.tokenizer.sha256[:12]}"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability in nats, and whether it is the greedy one."""
        pairs = [split_ids(self.tokenizer, *request.args) for request in requests]
        with self._bar("loglikelihood", len(pairs)) as bar:
            scores = self.scorer.score(pairs, bar.update)
        answers = [(score.log_probability, score.is_greedy) for score in scores]
        self._remember("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-probability in nats of each whole text, from the end of a document on."""
        answers = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=not self._progress):
            (ids,) = self.tokenizer.encode_arrays([request.args[0]])
            nats = 0.0
            if len(ids):
                nats, _ = evaluate_tokens(
                    self.model,
                    ids,
                    context_length=self.window or 1024,
                    batch_size=self.batch_size,
                    eos_id=self.tokenizer.eos_id,
                    carry_state=self.window is None,
                    full_last=True,
                )
            answers.append(-nats)
        self._remember("loglikelihood_rolling", requests, answers)
        return answers

    @torch.no_grad()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What follows each context, up to where one of the task's stop texts begins."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with self._bar("generate_until", len(requests)) as bar:
            for members in groups.values():
                settings, stops = generation_settings(requests[members[0]].args[1])
                # Sorted, so that contexts with the same beginning come to stand in one batch.
                ordered = sorted((self._context(requests[index], settings), index) for index in members)
                for batch in batches(ordered, self.batch_size):
                    texts = self._generate([context for context, _ in batch], settings, stops)
                    for (_, index), text in zip(batch, texts, strict=True):
                        answers[index] = text
                    bar.update(len(batch))
        self._remember("generate_until", requests, answers)
        return answers

    def _context(self, request: Instance, settings: SamplingSettings) -> tuple[int, ...]:
        ids = (self.tokenizer.eos_id, *map(int, self.tokenizer.encode(request.args[0])))
        if self.window is None:
            return ids
        return ids[-max(1, self.window - settings.max_tokens) :]

    def _generate(
        self, contexts: list[tuple[int, ...]], settings: SamplingSettings, stops: Sequence[str]
    ) -> list[str]:
        read = self.scorer.read(contexts)
        step = stepper(self.model, read.state, choose_decoder(self.model, "auto", "float32"))
        generator = torch.Generator(device=self._device).manual_seed(settings.seed)
        answers = [Answer(self.tokenizer, stops) for _ in contexts]
        logits = read.logits
        for position in range(settings.max_tokens):
            tokens = choose(logits[:, : self.tokenizer.vocab_size], settings, generator, None)
            for answer, token in zip(answers, tokens.tolist(), strict=True):
                answer.push(token)
            if position + 1 == settings.max_tokens or all(answer.ended for answer in answers):
                break
            logits = step(tokens)
        return [answer.finish() for answer in answers]

    def _bar(self, title: str, total: int) -> Any:
        return tqdm(total=total, desc=title, disable=not self._progress)

    def _remember(self, kind: str, requests: list[Instance], answers: Sequence[Any]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)


class Answer:
    """A text that grows token by token and ends at the end of a document or before a stop text."""

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str]) -> None:
        self._decoder, self._eos, self._stops = tokenizer.stream_decoder(), tokenizer.eos_id, stops
        self._text = ""
        self.ended = False

    def push(self, token: int) -> None:
        """Take one more token, unless the text has ended."""
        if self.ended:
            return
        if token == self._eos:
            self._text += self._decoder.finish()
            self.ended = True
        else:
            self._text += self._decoder.push(token)
        places = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if places:
            self._text, self.ended = self._text[: min(places)], True

    def finish(self) -> str:
        """The text; half a character at its end is U+FFFD."""
        return self._text if self.ended else self._text + self._decoder.finish()


def generation_settings(given: dict[str, Any]) -> tuple[SamplingSettings, list[str]]:
    """Sampling settings and stop texts out of a task's `generation_kwargs`. Raises UserError for others."""
    wanted = dict(given)
    stops = wanted.pop("until", None) or []
    stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [value for name in names if (value := wanted.pop(name, None)) is not None]
    sampled = wanted.pop("do_sample", None)
    temperature = float(wanted.pop("temperature", 1.0 if sampled else 0.0))
    settings = SamplingSettings(
        temperature=0.0 if sampled is False else temperature,
        top_k=int(wanted.pop("top_k", 0) or 0),
        top_p=float(wanted.pop("top_p", 1.0)),
        max_tokens=int(limits[0]) if limits else MAX_TOKENS,
    )
    if wanted:
        raise UserError(f"generation_kwargs {', '.join(sorted(wanted))}: not known here")
    return settings, stops


def evaluate_tasks(
    loaded: "LoadedModel",
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
    window: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The figures of tasks and groups of lm-evaluation-harness.

    Returns `tasks`: for each its figures (`acc`, `acc_stderr`, ...; of another filter than the first
    `figure (filter)`), and `items`, `fewshot` and `versions` by task. `limit`: items of each task.
    `include_path`: a folder with tasks in YAML. Raises UserError for a task that there is not, and for one
    whose data cannot be had.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    _quiet()
    manager = _manager(names, include_path)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--tasks {name}: lm-evaluation-harness has no such task{hint}")
    if not names:
        raise UserError("--tasks: name at least one task")
    # Its bootstrap would fork this process, whose threads a child does not have.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    model = HarnessModel(loaded, batch_size, window, progress)
    results = _data_or_one_line(
        lambda: simple_evaluate(
            model,
            tasks=list(names),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    )
    tasks = {task: _figures(found) for task, found in results["results"].items()}
    return {
        "tasks": tasks,
        "items": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "fewshot": results["n-shot"],
        "versions": results["versions"],
    }


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Knows the tasks of a folder and, where these are not all, those of the harness: ten thousand files."""
    if include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    if all(own.match_tasks([name]) for name in names):
        return own
    return TaskManager(include_path=str(include_path))


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    figures = {}
    for name, value in found.items():
        metric, comma, filter_name = name.partition(",")
        if comma and isinstance(value, int | float):
            figures[metric if filter_name == "none" else f"{metric} ({filter_name})"] = value
    return figures


def _quiet() -> None:
    for name in ("lm_eval", "lm-eval", "datasets", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _data_or_one_line(evaluate: Callable[[], Any]) -> Any:
    from datasets.exceptions import DatasetNotFoundError

    try:
        return evaluate()
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--tasks: the data of a task cannot be had ({reason})") from None
