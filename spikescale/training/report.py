"""The end of a run: whole-split losses beside a baseline, samples, and where everything is."""

from typing import TYPE_CHECKING

from spikescale.data_pipeline.manifest import Manifest
from spikescale.evaluation.language_model import LanguageModelResult
from spikescale.evaluation.ngram import trigram_baseline
from spikescale.inference.sampling import SamplingSettings
from spikescale.inference.text import complete
from spikescale.training.agreement import agreed, from_main
from spikescale.training.dataset import Dataset
from spikescale.training.records import run_address

if TYPE_CHECKING:
    from spikescale.training.run import Pretraining


def sample_texts(run: "Pretraining") -> list[str]:
    """Texts generated in recurrent form by the model as it is. Every rank takes part and gets the same."""
    train = run.config.train
    settings = SamplingSettings(
        temperature=train.temperature, top_p=train.top_p, seed=train.seed, max_tokens=train.sample_tokens
    )
    prompt, samples = train.sample_prompt, train.sample_count
    model = run.parts.whole_logits(run.engine.module)
    texts = complete(model, run.tokenizer, prompt, samples=samples, settings=settings)
    return [prompt + text for text in texts]


def settled(run: "Pretraining") -> Dataset:
    """The data of the run: of parts that have not been made by now, what there is to validate."""
    if not run.data.live:
        return run.data
    made = from_main(
        run.process,
        lambda: [part.name for part in run.data.live if part.producer and part.producer.complete],
    )
    data = agreed(run.process, lambda: run.data.settled(made))
    if data.live:
        which = f" ({', '.join(part.name for part in data.live)})" if data.mixed else ""
        run.console.say(
            f"the data are not all made{which}: the shards that validation had from the start are evaluated"
        )
    return data


def final_report(run: "Pretraining") -> None:
    """Evaluate valid and test, and as much of train, then print the table and the samples."""
    console, train = run.console, run.config.train
    data = run.data = settled(run)
    sizes = {split: data.totals(split).tokens for split in ("train", "valid", "test")}
    limits = dict.fromkeys(sizes, train.final_evaluation_tokens)
    limits["train"] = min(limits["train"], sizes["test"] or sizes["valid"] or train.evaluate_tokens)
    results: dict[str, LanguageModelResult] = {}
    for split, size in sizes.items():
        if size:
            console.say(f"evaluating {min(size, limits[split])} of {size} tokens of {split} ...")
            found = run.evaluate(split, limits[split])
            results[split] = run.combined(split, found)
            if data.mixed:
                results |= {f"{split}: {name}": result for name, result in found.items()}
    texts = sample_texts(run) if train.sample_count else []
    run.records.write_samples(run.step, texts)
    if not run.process.is_main:
        return
    judged = [split for split in results if split in ("valid", "test")]
    baseline: dict[str, float] = {}
    whole = data.parts[0].manifest
    if train.trigram_baseline and judged and not data.mixed and isinstance(whole, Manifest):
        baseline = trigram_baseline(whole, run.tokenizer, judged)
    rows = []
    for split, result in results.items():
        known = baseline.get(split)
        rows.append(
            [
                split,
                f"{result.loss:.4f}",
                f"{result.perplexity:.2f}",
                f"{result.bits_per_byte:.4f}",
                f"{result.bits_per_character:.4f}",
                "-" if known is None else f"{known:.4f}",
                str(result.tokens),
            ]
        )
    columns = ["split", "nats/token", "perplexity", "bits/byte", "bits/char", "trigram bits/byte", "tokens"]
    console.table(f"{run.config.name} at step {run.step}", columns, rows)
    steps, seconds = run.clock.total_steps, run.clock.total_seconds
    speed = run.tokens_per_step * steps / seconds if steps else 0.0
    firing = run.mean_firing_rate
    facts = [
        ("training speed", f"{speed:.0f} tokens/s" if speed else "no step was taken"),
        ("firing rate", "-" if firing is None else f"{firing:.4f} spikes a token and neuron"),
        ("checkpoint", str(run.checkpoints.folder / run.checkpoints.names()[-1])),
        ("best checkpoint", str(run.checkpoints.best())),
        *run_address(run.records),
    ]
    for what, where in facts:
        console.say(f"{what:<16}  {where}")
    summary = {
        f"{split}_bits_per_byte": result.bits_per_byte for split, result in results.items() if split in sizes
    }
    summary |= {f"{split}_trigram_bits_per_byte": value for split, value in baseline.items()}
    run.records.write_summary(summary | ({"tokens_per_second": speed} if speed else {}))
    run.records.write_result(
        {
            "step": run.step,
            "tokens": run.step * run.tokens_per_step,
            "parameters": run.model.count_parameters(),
            "firing_rate": firing,
            "splits": {split: result.as_dict() for split, result in results.items()},
        }
    )
    for number, text in enumerate(texts, 1):
        console.say(f"\n--- sample {number}\n{text}")
