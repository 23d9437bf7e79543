"""The end of a run: whole-split losses beside a baseline, samples, and where everything is."""

from typing import TYPE_CHECKING

import torch

from spikescale.data_pipeline.stream import iterate_documents
from spikescale.evaluation.language_model import LanguageModelResult
from spikescale.evaluation.ngram import ByteTrigram
from spikescale.inference.generate import generate
from spikescale.inference.sampling import SamplingSettings
from spikescale.training.records import run_address

if TYPE_CHECKING:
    from spikescale.training.pretrain import Pretraining


def sample_texts(run: "Pretraining") -> list[str]:
    """Texts generated in recurrent form by the model as it is. Every rank takes part and gets the same."""
    train = run.config.train
    prompts = torch.tensor([run.tokenizer.encode(train.sample_prompt)] * train.sample_count, dtype=torch.long)
    settings = SamplingSettings(
        temperature=train.temperature, top_p=train.top_p, seed=train.seed, max_tokens=train.sample_tokens
    )
    steps = [
        tokens.cpu()
        for tokens in generate(run.engine.module, prompts, eos_id=run.tokenizer.eos_id, settings=settings)
    ]
    return [train.sample_prompt + run.tokenizer.decode(row.tolist()) for row in torch.stack(steps, dim=1)]


def final_report(run: "Pretraining") -> None:
    """Evaluate all of valid and test and as much of train, then print the table and the samples."""
    console, manifest = run.console, run.manifest
    console.say("evaluating whole splits ...")
    results: dict[str, LanguageModelResult] = {}
    for split in ("train", "valid", "test"):
        tokens = manifest.totals(split).tokens
        if tokens:
            results[split] = run.evaluate(
                split, manifest.totals("test").tokens or None if split == "train" else None
            )
    texts = sample_texts(run) if run.config.train.sample_count else []
    run.records.write_samples(run.step, texts)
    if not run.process.is_main:
        return
    wanted = [split for split in results if split != "train"] if run.config.train.trigram_baseline else []
    baseline = trigram_bits_per_byte(run, wanted)
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
    speed = run.tokens_per_step * run.total_steps / run.total_seconds if run.total_steps else 0.0
    facts = [
        ("training speed", f"{speed:.0f} tokens/s" if speed else "no step was taken"),
        (
            "firing rate",
            f"{run.mean_firing_rate:.4f} spikes a token and neuron" if run.mean_firing_rate else "-",
        ),
        ("checkpoint", str(run.checkpoints.folder / run.checkpoints.names()[-1])),
        ("best checkpoint", str(run.checkpoints.best())),
        *run_address(run.records),
    ]
    for what, where in facts:
        console.say(f"{what:<16}  {where}")
    summary = {f"{split}_bits_per_byte": result.bits_per_byte for split, result in results.items()}
    summary |= {f"{split}_trigram_bits_per_byte": value for split, value in baseline.items()}
    run.records.write_summary(summary | ({"tokens_per_second": speed} if speed else {}))
    for number, text in enumerate(texts, 1):
        console.say(f"\n--- sample {number}\n{text}")


def trigram_bits_per_byte(run: "Pretraining", splits: list[str]) -> dict[str, float]:
    """Bits a byte of a byte trigram model fitted on the whole training split, for each of `splits`."""

    def documents(split: str) -> list[bytes]:
        ids = iterate_documents(run.manifest, split)
        eos = run.tokenizer.eos_id
        return [run.tokenizer.decode_bytes([t for t in document.tolist() if t != eos]) for document in ids]

    if not splits:
        return {}
    model = ByteTrigram.fit(documents("train"))
    return {split: model.bits_per_byte(documents(split)) for split in splits}
