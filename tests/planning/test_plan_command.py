"""`spikescale plan` as its users call it."""

import json
import subprocess
import sys

import pytest
import yaml

from spikescale.cli.main import main
from spikescale.config import load_config


def test_the_tables_the_recommendation_and_the_cost(capsys):
    words = ["plan", "--model", "1b2", "--gpus", "16", "--gpu-mem", "80", "--tokens", "300e9", "--price", "2"]
    assert main([*words, "--checkpointing"]) == 0
    output = capsys.readouterr().out
    assert "1b2: 24 layers, width 1792, 50277 symbols, 1182.6M parameters" in output
    for words in (
        "NVIDIA A100 data sheet",
        "Recommended: stage",
        "zero:",
        "preset: stage",
        "days",
        "at 2 a device",
    ):
        assert words in output
    for stage in ("2-cpu", "3-nvme"):
        assert stage in output


def test_json_says_the_same_in_bytes(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", "--model", "46m", "--gpus", "2", "--stage", "2", "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert plan["parameters"] == 41_226_240
    assert [candidate["stage"] for candidate in plan["candidates"]] == ["2", "2-cpu"]
    first = plan["candidates"][0]
    assert first["device_bytes"] == max(sum(phase["device"].values()) for phase in first["phases"])
    assert first["step_seconds"] == pytest.approx(
        sum(first[f"{part}_seconds"] for part in ("matrix", "traffic", "communication", "offload"))
    )
    assert plan["recommended"]["settings"]["zero"] == {"preset": "stage2"}


def test_the_recommended_words_are_a_run_file(tmp_path, capsys):
    assert main(["plan", "--model", "216m", "--gpus", "4", "--micro-batch", "4"]) == 0
    output = capsys.readouterr().out
    text = output.partition("In the run's file:\n\n")[2]
    settings = yaml.safe_load(text)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**settings, "data": {"path": "data"}, "model": {"preset": "216m"}}))
    config = load_config(file)
    assert (config.train.batch_size, config.train.micro_batch_size) == (16, 4)
    assert config.train.precision == "bfloat16"


def test_a_run_file_is_planned_as_it_stands(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: data}\nmodel: {preset: 46m}\ntrain: {steps: 1000, batch_size: 32}\n")
    assert main(["plan", "--config", str(file), "--gpus", "4", "--device", "h100"]) == 0
    output = capsys.readouterr().out
    assert "8 x 1 sequences of 1024 tokens a rank and step, float32, activations kept" in output
    assert "32.8M tokens" in output


def test_nothing_fits_exits_with_1_and_says_what_to_try(capsys):
    assert main(["plan", "--model", "1b2", "--gpu-mem", "2"]) == 1
    output = capsys.readouterr().out
    assert "Nothing fits" in output
    assert "try --checkpointing" in output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "9b"], "no preset '9b'"),
        (["--model", "tiny", "--device", "abacus"], "--device abacus: unknown"),
        (["--model", "tiny", "--gpus", "3", "--tensor", "2"], "parallel.tensor = 2: does not divide"),
        (["--model", "tiny", "--gpus", "4", "--tensor", "2", "--context-ranks", "2"], "do not go together"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line(capsys, words, complaint):
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--price", "-1"], ["--efficiency", "1.5"]])
def test_values_out_of_range_are_usage_errors(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", "tiny", *words])
    assert ended.value.code == 2
    assert "is not a" in capsys.readouterr().err


def test_planning_needs_no_torch():
    code = (
        "import sys; from spikescale.cli.main import main;"
        "code = main(['plan', '--model', '216m', '--gpus', '8']);"
        "sys.exit(code or [name for name in ('torch', 'deepspeed', 'megatron') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
