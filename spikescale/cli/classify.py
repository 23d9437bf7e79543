"""`spikescale classify`: fine-tune on labelled texts, beside baselines, over seeds."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer
    from spikescale.finetune.contenders import Contender

BASELINES = "majority,tfidf,lstm,textcnn,rwkv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from spikescale.config.schema import Variant

    parser.epilog = (
        "Every finished run is kept in OUTPUT/runs; the same command goes on where it was stopped. OUTPUT "
        "gets classification.json, .md and .png."
    )
    parser.add_argument(
        "data",
        help="vader-movies, sst2, sst5, mr, subj, hub:OWNER/NAME, or a .csv, .tsv, .jsonl or .parquet file",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--model", type=Path, action="append", help="a pretrained run or model folder; repeatable"
    )
    parser.add_argument(
        "--new",
        action="append",
        choices=get_args(Variant),
        help="a new model of this variant; repeatable (default without --model: spikegpt)",
    )
    parser.add_argument("--preset", default="tiny", help="shape of new models")
    parser.add_argument("--layers", type=int, help="of new models (default: the preset's)")
    parser.add_argument("--width", type=int, help="of new models (default: the preset's)")
    parser.add_argument(
        "--dropout", type=float, help="of new models' residual stream (default: the preset's)"
    )
    parser.add_argument(
        "--float-embedding", action="store_true", help="new models do not binarise embeddings"
    )
    parser.add_argument(
        "--tokenizer",
        default="byte",
        help="of new models; sentencepiece:SIZE learns it from the training texts",
    )
    parser.add_argument("--baselines", default=BASELINES, help="comma-separated, of these; or none")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each, by seeds 0, 1, ...")
    parser.add_argument("--text-column", help="column with the texts (default: one of the usual names)")
    parser.add_argument("--label-column", help="column with the classes (default: one of the usual names)")
    parser.add_argument(
        "--valid", type=Path, help="file with the validation rows (default: 10%% of the training rows)"
    )
    parser.add_argument(
        "--test", type=Path, help="file with the test rows (default: the set's, or 10%% of all rows)"
    )
    parser.add_argument(
        "--split-seed", type=int, default=0, help="draws the rows of splits that are not given"
    )
    parser.add_argument(
        "--limit", type=int, help="train on so many rows only, drawn class by class by --split-seed"
    )
    parser.add_argument("--epochs", type=int, default=12, help="the most passes over the training texts")
    parser.add_argument("--patience", type=int, default=3, help="epochs without a better validation accuracy")
    parser.add_argument("--batch-size", type=int, default=32, help="texts of a step")
    parser.add_argument("--max-tokens", type=int, default=256, help="longer texts are cut")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of new models and baselines")
    parser.add_argument("--finetune-lr", type=float, default=3e-4, help="learning rate of pretrained bodies")
    parser.add_argument(
        "--class-weights",
        choices=("none", "balanced"),
        default="none",
        help="balanced: rare classes weigh more in the loss",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--save",
        type=Path,
        help="folder to make: the first spiking contender of seed 0, for transformers; it is trained again if"
        " only its figures were kept",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train everything that is not there yet, and print the table."""
    from spikescale.finetune.comparison import JSON_FILE, compare, run_key, table, task_fingerprint
    from spikescale.finetune.save import is_saved, save_classifier
    from spikescale.finetune.tasks import load_task

    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: must be 1 or more")
    contenders = _contenders(arguments)
    chosen = next((contender for contender in contenders if contender.is_spiking), None)
    if arguments.save is not None and chosen is None:
        raise UserError(f"--save {arguments.save}: there is no spiking contender; add --model or --new")
    task = load_task(
        arguments.data,
        text=arguments.text_column,
        label=arguments.label_column,
        valid=arguments.valid,
        test=arguments.test,
        split_seed=arguments.split_seed,
        limit=arguments.limit,
    )
    for note in task.notes:
        print(note, file=sys.stderr)
    unsaved: dict[str, Any] | None = None  # the run whose model is still to be saved
    if arguments.save is not None and chosen is not None:
        unsaved = run_key(task_fingerprint(task), chosen, 0)
        if is_saved(arguments.save, unsaved):
            print(f"{arguments.save}: saved already", file=sys.stderr)
            unsaved = None

    def is_to_be_saved(contender: "Contender", seed: int) -> bool:
        return unsaved is not None and contender is chosen and seed == 0

    def finished(contender: "Contender", seed: int, result: Any) -> None:
        if unsaved is not None and is_to_be_saved(contender, seed):
            save_classifier(result, task, arguments.save, unsaved)

    with _Bars() as bars:
        summary = compare(
            task,
            contenders,
            range(arguments.seeds),
            arguments.output,
            say=bars.say,
            progress=bars.start,
            finished=finished,
            anew=is_to_be_saved,  # kept runs keep no models
        )
    print(table(summary), end="")
    print(f"{arguments.output / JSON_FILE}", file=sys.stderr)
    return 0


def _contenders(arguments: argparse.Namespace) -> list["Contender"]:
    from spikescale.config import load_model_preset
    from spikescale.finetune import contenders as kinds
    from spikescale.finetune.classify import ClassifySettings
    from spikescale.inference.device import choose_device

    wanted = [] if arguments.baselines in ("", "none") else arguments.baselines.split(",")
    for name in wanted:
        if name not in kinds.BASELINES:
            raise UserError(f"--baselines {name}: must be of {', '.join(kinds.BASELINES)}, or none")
    new = ClassifySettings(
        epochs=arguments.epochs,
        patience=arguments.patience,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
        lr=arguments.lr,
        head_lr=arguments.lr,
        class_weights=arguments.class_weights,
        device=str(choose_device(arguments.device)),
    )
    changes = {
        key: value for key in ("layers", "width", "dropout") if (value := getattr(arguments, key)) is not None
    }
    if arguments.float_embedding:
        changes["binary_embedding"] = False
    variants = arguments.new or ([] if arguments.model else ["spikegpt"])
    made: list[Contender] = []
    tuned = ClassifySettings(**{**new.as_dict(), "lr": arguments.finetune_lr})
    made += [kinds.pretrained(path, tuned) for path in arguments.model or []]
    tokenizer = _tokenizer(arguments.tokenizer)

    def scratch(variant: str) -> "Contender":
        rest = {**changes, "binary_embedding": False} if variant == "rwkv" else changes
        config = load_model_preset(arguments.preset, variant=variant, **rest)
        return kinds.from_scratch(config, tokenizer, arguments.tokenizer, new)

    made += [scratch(variant) for variant in variants]
    for name in wanted:
        if name == "majority":
            made.append(kinds.majority())
        elif name == "tfidf":
            made.append(kinds.tfidf(new))
        elif name in ("lstm", "textcnn"):
            made.append(kinds.word_network(name, new))
        elif "rwkv" not in variants:
            made.append(scratch("rwkv"))
    return kinds.one_of_a_kind(made)


def _tokenizer(spec: str) -> "Callable[[Sequence[str]], Tokenizer]":
    from spikescale.data_pipeline.tokenizers import make_tokenizer, parse_spec

    parsed = parse_spec(spec)

    made: dict[tuple[str, ...], Tokenizer] = {}  # of the training texts, which are the same for all seeds

    def make(texts: Sequence[str]) -> "Tokenizer":
        key = tuple(texts)
        if key not in made:
            made[key] = make_tokenizer(parsed, characters=set().union(*texts), texts=texts)
        return made[key]

    if parsed.kind == "syllable":
        raise UserError(f"--tokenizer {spec}: not for classification; take byte, char or sentencepiece:SIZE")
    return make


class _Bars:
    """A progress bar for the training that runs."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: Any = None

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._clear()
        self._progress.console.print(line, highlight=False, markup=False)

    def start(self, name: str, seed: int) -> Callable[[int, int, int, float], None]:
        """A bar for one training; what training calls."""
        self._clear()
        self._task = self._progress.add_task(f"{name}, seed {seed}", total=None)

        def update(epoch: int, done: int, total: int, best: float) -> None:
            text = f"{name}, seed {seed}, epoch {epoch}, best {best:.1%}"
            self._progress.update(self._task, description=text, completed=done, total=total)

        return update

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
