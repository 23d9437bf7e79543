"""Fine-tuning: what is trained, what stays, and that the result is an ordinary model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spikescale.cli.main import main
from spikescale.config import ModelConfig, NeuronConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.finetune.methods import MethodSettings, Tuning
from spikescale.finetune.texts import Windows, raw_text
from spikescale.model import SpikeGPT
from spikescale.model.store import load_model_folder, save_model_folder

LAYERS, WIDTH = 3, 16


def random_model(variant: str = "spikegpt") -> SpikeGPT:
    config = ModelConfig(
        variant=variant,
        layers=LAYERS,
        width=WIDTH,
        vocab_size=256,
        context_length=32,
        binary_embedding=variant != "rwkv",
        neuron=NeuronConfig(v_threshold=0.2 if variant == "spikegpt-driven" else 1.0),
    )
    model = SpikeGPT(config).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    model = random_model()
    save_model_folder(
        folder, dict(model.named_parameters()), model.config, make_tokenizer("byte"), {"step": 7}
    )
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "new.txt"
    path.write_text("spikes go up and membranes leak. " * 300)
    return path


def test_windows_cover_an_epoch_in_an_order_of_its_own():
    tokens = np.arange(101)
    windows = Windows(tokens, 10, seed=1)
    first, second = windows.rows(0, 10), windows.rows(10, 10)
    assert first.shape == (10, 11)
    assert sorted(first[:, 0].tolist()) == list(range(0, 100, 10)) == sorted(second[:, 0].tolist())
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert torch.equal(windows.rows(3, 2), first[3:5])
    assert not torch.equal(Windows(tokens, 10, seed=2).rows(0, 10), first)
    assert all((row[1:] - row[:-1] == 1).all() for row in first)
    with pytest.raises(UserError, match="10 tokens to train on: too few for one sample of 11"):
        Windows(np.arange(10), 10, 0)


def test_raw_text_is_cut_into_three_parts_that_are_the_text(tmp_path):
    contents = ["first é " * 50, "second " * 100]
    files = [tmp_path / f"{number}.txt" for number in range(2)]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content, encoding="utf-8")
    tokenizer = make_tokenizer("byte")
    found = raw_text(files, tokenizer, 16, 0)
    whole = "".join(contents)
    valid, test = (tokenizer.decode(part.tokens.tolist()) for part in (found.valid, found.test))
    assert test == whole[round(0.95 * len(whole)) :]
    assert valid == whole[round(0.9 * len(whole)) : round(0.95 * len(whole))]
    size = len(whole[: round(0.9 * len(whole))].encode())
    assert found.train_tokens == size + 2  # two documents end in it
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match="too short to set a test part aside"):
        raw_text([tmp_path / "short.txt"], tokenizer, 16, 0)


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        (MethodSettings(), ()),
        (MethodSettings("frozen"), ("embedding.", "blocks.0.")),
        (MethodSettings("frozen", frozen_layers=2), ("embedding.", "blocks.0.", "blocks.1.")),
        (MethodSettings("frozen", frozen_layers=0), ("embedding.",)),
    ],
)
def test_the_first_layers_are_frozen_and_nothing_else(settings, frozen):
    model = random_model()
    trained = Tuning(model, settings).trainable().keys()
    expected = {name for name, _ in model.named_parameters() if not name.startswith(frozen or ("none",))}
    assert trained == expected


@pytest.mark.parametrize("variant", ["rwkv", "spikegpt", "spikegpt-driven"])
def test_adapters_start_as_nothing_and_merge_to_what_they_computed(variant, tmp_path):
    from peft import PeftModel

    model = random_model(variant)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 255, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, _ = model(tokens)
        tuning = Tuning(model, MethodSettings("lora", rank=4))
        trainable = tuning.trainable()
        assert torch.allclose(model(tokens)[0], plain, atol=1e-5)
        # A (4, C) and B (C, 4) for each of four projections a block; the model itself is left alone.
        assert sum(p.numel() for p in trainable.values()) == LAYERS * 4 * 2 * 4 * WIDTH
        assert all(".time_mix." in name and ".lora_" in name for name in trainable)
        generator = torch.Generator().manual_seed(1)
        for p in trainable.values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        adapted, _ = model(tokens)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        tuning.save_adapter(tmp_path / "adapter")
        weights = dict(tuning.merged_weights())
    assert weights.keys() == before.keys()
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    projections = ("key", "value", "receptance", "output")
    assert changed == {f"blocks.{n}.time_mix.{name}.weight" for n in range(LAYERS) for name in projections}
    scale = 16 / 4
    name = "blocks.1.time_mix.value"
    low, high = (trainable[f"{name}.lora_{half}.default.weight"].detach() for half in "AB")
    expected = before[f"{name}.weight"] + scale * high @ low
    assert torch.allclose(weights[f"{name}.weight"], expected, atol=1e-5)
    # Rounding may flip a spike; without neurons the outputs agree.
    if variant == "rwkv":
        assert torch.allclose(model(tokens)[0], adapted, atol=1e-3)
    again = random_model(variant)
    PeftModel.from_pretrained(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again(tokens)[0], adapted, atol=1e-5)


def tuned(
    capsys: pytest.CaptureFixture[str], base: Path, text: Path, output: Path, *words: str
) -> dict[str, Any]:
    capsys.readouterr()
    command = ["finetune", str(base), "--text", str(text), "--output", str(output), "--steps", "12"]
    command += [
        "--batch-size",
        "4",
        "--evaluate-every",
        "6",
        "--warmup-steps",
        "2",
        "--threads",
        "1",
        "--no-mlflow",
    ]
    assert main([*command, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["full", "frozen", "lora"])
def test_tuning_leaves_a_model_that_is_better_at_the_text_and_is_as_said(
    base, text, tmp_path, capsys, method
):
    words = ["--method", method, *(["--frozen-layers", "1"] if method == "frozen" else [])]
    figures = tuned(capsys, base, text, tmp_path / "out", *words)
    assert figures["after"]["bits_per_byte"] < figures["before"]["bits_per_byte"] - 0.05
    assert figures["best_step"] in (6, 12)
    loaded, start = load_model_folder(tmp_path / "out" / "model"), load_model_folder(base)
    assert loaded.info["before"] == {"step": 7}
    changed = {
        name
        for (name, p), (_, q) in zip(
            loaded.model.named_parameters(), start.model.named_parameters(), strict=True
        )
        if not torch.equal(p, q)
    }
    weights = {name: p.numel() for name, p in start.model.named_parameters()}
    assert figures["total"] == sum(weights.values())
    if method == "full":
        assert figures["trainable"] == figures["total"]
    if method == "frozen":
        assert not any(name.startswith(("embedding.", "blocks.0.")) for name in changed)
        assert {"head.weight", "blocks.1.channel_mix.key.weight", "ln_out.weight"} <= changed
    if method == "lora":
        assert all(".time_mix." in name and name.endswith(".weight") for name in changed)
        assert figures["trainable"] == LAYERS * 4 * 2 * 8 * WIDTH
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    # Weights, and gradients and two moments of what is trained, 4 bytes each.
    extra = figures["trainable"] if method == "lora" else 0
    assert figures["state_bytes"] == 4 * (figures["total"] + extra + 3 * figures["trainable"])
    # The figures are those of the model that was saved.
    command = ["evaluate", str(tmp_path / "out" / "model"), "--json", "--batch-size", "4", "--text"]
    content = text.read_text()
    (tmp_path / "test.txt").write_text(content[round(0.95 * len(content)) :])
    assert main([*command, str(tmp_path / "test.txt")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bits_per_byte"] == pytest.approx(figures["after"]["bits_per_byte"], rel=1e-6)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_a_run_that_only_gets_worse_gives_the_model_back(base, text, tmp_path, capsys):
    figures = tuned(capsys, base, text, tmp_path / "out", "--lr", "5", "--warmup-steps", "0", "--steps", "1")
    assert (figures["best_step"], figures["after"]) == (0, figures["before"])
    loaded, start = load_model_folder(tmp_path / "out" / "model"), load_model_folder(base)
    pairs = zip(loaded.model.parameters(), start.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_what_the_model_knew_is_judged_too(base, text, tmp_path, capsys):
    prepare = ["data", "prepare", "--source", str(text), "--split-by", "position", "--no-ray", "--quiet"]
    assert main([*prepare, "--output", str(tmp_path / "data")]) == 0
    words = ["finetune", str(base), "--data", str(tmp_path / "data"), "--kept", str(tmp_path / "data")]
    words += [
        "--output",
        str(tmp_path / "out"),
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--no-mlflow",
        "--threads",
        "1",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["test bits/byte"].split("  ")[-1] == lines["kept text, bits/byte"].split("  ")[-1]
    assert main(words) == 2
    assert "holds a finished tuning; choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--method", "frozen", "--frozen-layers", "4"],
            "frozen layers = 4: must be from 0 to the model's 3",
        ),
        (["--frozen-layers", "1"], "frozen layers = 1: goes with method frozen"),
        (["--method", "lora", "--rank", "0"], "LoRA rank = 0: must be at least 1"),
        (["--method", "lora", "--targets", "key,head"], "LoRA targets key,head: must be of key, value"),
        (["--steps", "0"], "--steps 0: input should be greater than 0"),
        (["--context-length", "99999"], "too few for one sample of 100000"),
    ],
)
def test_bad_options_are_refused_in_one_line(base, text, tmp_path, words, complaint, capsys):
    command = ["finetune", str(base), "--text", str(text), "--output", str(tmp_path / "out"), "--no-mlflow"]
    assert main([*command, *words]) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_the_benchmark_picks_the_better_rate_and_repeats_nothing(base, text, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import finetune as benchmark

    prepare = ["data", "prepare", "--source", str(text), "--split-by", "position", "--no-ray", "--quiet"]
    assert main([*prepare, "--output", str(tmp_path / "data")]) == 0
    assert all(len(set(rates)) >= 3 for _, rates in benchmark.METHODS.values())
    monkeypatch.setattr(benchmark, "METHODS", {"full": (["--method", "full"], (1e-3, 1e-2, 1e-1))})
    started = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(command)
        words = command[3:]
        return SimpleNamespace(returncode=main(words))

    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=run, DEVNULL=-3))
    words = ["--base", str(base), "--data", str(tmp_path / "data"), "--kept", str(tmp_path / "data")]
    words += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.json"), "--steps", "4"]
    assert benchmark.main([*words, "--minutes", "0"]) == 75
    assert (benchmark.main(words), benchmark.main(words), len(started)) == (0, 0, 3)
    row = json.loads((tmp_path / "out.json").read_text())["rows"]["full"]
    assert row["best_valid_loss"] == min(row["tried"].values()) == row["tried"][str(row["lr"])]
    assert len(set(row["tried"].values())) == 3
    out = capsys.readouterr().out
    assert "the model as it was" in out
    # A best rate at the end of those that were tried is marked; one between others is not.
    losses = {float(rate): loss for rate, loss in row["tried"].items()}
    assert row["at_border"] == (row["lr"] in (min(losses), max(losses))) == ("beyond it" in out)
    rising = {1e-3: 3.0, 1e-2: 2.0, 1e-1: 2.5}
    monkeypatch.setattr(
        benchmark, "_run", lambda a, n, w, rate, end: {"lr": rate, "best_valid_loss": rising[rate]}
    )
    assert not benchmark._best(None, "full", sorted(rising), 0)["at_border"]
    rising[1e-2] = 2.7
    assert benchmark._best(None, "full", sorted(rising), 0)["at_border"]
    assert benchmark._rates(["full=3e-3,1e-3,2e-3"]) == {"full": [1e-3, 2e-3, 3e-3]}
    for words, complaint in (
        ("full=1e-3,2e-3", "three rates or more"),
        ("half=1,2,3", "no method 'half'; there are full"),
        ("full=a", "must be METHOD=LR,LR,LR"),
    ):
        with pytest.raises(UserError, match=complaint):
            benchmark._rates([words])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_rates_of_a_model_with_width_transfer_are_those_of_its_pretraining(text, method):
    from spikescale.config import TrainConfig
    from spikescale.finetune.tune import Tuner, TuneSettings

    tokenizer = make_tokenizer("byte")
    config = ModelConfig(layers=1, width=32, vocab_size=256, context_length=16, width_transfer=8)
    tuning = Tuning(SpikeGPT(config), MethodSettings(method))
    train = TrainConfig(steps=2, batch_size=2, lr=1e-3, min_lr=1e-3, warmup_steps=0, weight_decay=0.1)
    tuner = Tuner(tuning, tokenizer, raw_text([text], tokenizer, 16, 0), TuneSettings(train, 16))
    tuner._step()
    groups = {id(p): group for group in tuner.optimizer.param_groups for p in group["params"]}
    scaled = set()
    for name, parameter in tuner.parameters.items():
        group = groups[id(parameter)]
        if parameter.ndim < 2:
            assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0), name
            continue
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-4), name
        if group["lr"] == pytest.approx(1e-3 * 8 / 32):
            scaled.add(name)
        else:
            assert group["lr"] == 1e-3
    matrices = {name for name, parameter in tuner.parameters.items() if parameter.ndim == 2}
    read_other_widths = {name for name in matrices if name == "embedding.weight" or ".lora_B." in name}
    assert scaled == matrices - read_other_widths and scaled and read_other_widths


def test_eight_bit_weights_are_not_trained(base, text, tmp_path, capsys):
    assert main(["quantize", str(base), "--output", str(tmp_path / "int8")]) == 0
    command = ["finetune", str(tmp_path / "int8"), "--text", str(text), "--output", str(tmp_path / "out")]
    assert main([*command, "--no-mlflow"]) == 2
    assert "has 8-bit weights, which cannot be trained" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tuning_that_was_stopped_goes_on_to_the_same_weights(
    base, text, tmp_path, capsys, monkeypatch, method
):
    from spikescale.finetune.tune import Tuner

    words = ["--method", method, *(["--lora-dropout", "0.2"] if method == "lora" else [])]
    whole = tuned(capsys, base, text, tmp_path / "whole", *words)
    step = Tuner._step

    def stop_at_eight(self: Tuner) -> None:
        if self.figures.step == 8:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Tuner, "_step", stop_at_eight)
    command = [
        "finetune",
        str(base),
        "--text",
        str(text),
        "--output",
        str(tmp_path / "part"),
        "--steps",
        "12",
    ]
    command += [
        "--batch-size",
        "4",
        "--evaluate-every",
        "6",
        "--warmup-steps",
        "2",
        "--threads",
        "1",
        "--no-mlflow",
    ]
    assert main([*command, *words]) == 130
    monkeypatch.undo()
    assert main([*command, *words, "--lr", "0.01"]) == 2
    assert "a tuning with lr = 0.00" in capsys.readouterr().err
    part = tuned(capsys, base, text, tmp_path / "part", *words)
    for key in ("before", "after", "best_step", "best_valid_loss", "trainable"):
        assert part[key] == whole[key], key
    weights = [load_model_folder(tmp_path / name / "model").model.parameters() for name in ("whole", "part")]
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
    records = [
        [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    ]
    assert records[0] == records[1]
    assert not (tmp_path / "part" / "progress.safetensors").exists()
