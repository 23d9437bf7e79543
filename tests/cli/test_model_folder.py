"""Model folders: written whole, found wherever they are, refused with one clear line when damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikescale import files
from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import load_tokenizer, make_tokenizer, parse_spec
from spikescale.errors import UserError
from spikescale.model import SpikeGPT
from spikescale.model.store import find_model_folder, load_model_folder, save_model_folder

CONFIG = ModelConfig(layers=2, width=16, vocab_size=256, context_length=32)


def save(folder: Path, config: ModelConfig = CONFIG, seed: int = 3) -> SpikeGPT:
    model = SpikeGPT(config, seed=seed)
    tokenizer = make_tokenizer(parse_spec("byte"), [])
    info = {"step": 200, "tokens_seen": 51200, "metrics": {"valid_loss": 1.5}}
    save_model_folder(folder, dict(model.named_parameters()), config, tokenizer, info)
    return model


def resign(folder: Path) -> None:
    """Make the recorded checksum that of the weights as they are now."""
    settings = json.loads((folder / "model.json").read_text())
    settings["weights_sha256"] = files.sha256_file(folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(settings))


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved = save(tmp_path / "m")
    loaded = load_model_folder(tmp_path / "m")
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, dict(loaded.model.named_parameters())[name]), name
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(saved.eval()(tokens)[0], loaded.model(tokens)[0])
    assert loaded.config == CONFIG
    assert loaded.info == {"step": 200, "tokens_seen": 51200, "metrics": {"valid_loss": 1.5}}
    assert loaded.tokenizer.encode("é") == [0xC3, 0xA9]
    assert not loaded.model.training
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "model.json",
        "model.safetensors",
        "tokenizer",
    ]


def test_bfloat16_weights_are_stored_as_float32(tmp_path):
    weights = {name: p.detach().bfloat16() for name, p in SpikeGPT(CONFIG).named_parameters()}
    save_model_folder(tmp_path / "m", weights, CONFIG, make_tokenizer(parse_spec("byte"), []), {})
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(torch.equal(stored[name], weight.float()) for name, weight in weights.items())


def test_a_backend_can_be_forced_at_load(tmp_path):
    save(tmp_path / "m")
    assert load_model_folder(tmp_path / "m", backend="reference").model.config.backend == "reference"
    assert load_model_folder(tmp_path / "m").model.config.backend == "auto"


def test_a_folder_that_holds_something_is_never_overwritten(tmp_path):
    save(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        save(tmp_path / "m", seed=4)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def change_tensors(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        resign(folder)

    return damage


def change_settings(**changes):
    def damage(folder: Path) -> None:
        settings = json.loads((folder / "model.json").read_text())
        for key, value in changes.items():
            if isinstance(value, dict):
                settings[key].update(value)
            else:
                settings[key] = value
        (folder / "model.json").write_text(json.dumps(settings))

    return damage


def truncate_and_resign(folder: Path) -> None:
    truncate_weights(folder)
    resign(folder)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (lambda folder: (folder / "model.json").unlink(), "model.json: no such file"),
        (lambda folder: (folder / "model.json").write_text("{"), "not valid JSON"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
        (truncate_weights, "damaged, its SHA-256 is"),
        (flip_a_bit, "damaged, its SHA-256 is"),
        (truncate_and_resign, "not a readable safetensors file"),
        (change_tensors(lambda tensors: tensors.pop("head.weight")), "lacks tensor head.weight"),
        (change_tensors(lambda tensors: tensors.update(extra=torch.ones(1))), "has unexpected tensor extra"),
        (
            change_tensors(lambda tensors: tensors.update({"head.weight": torch.ones(256, 8)})),
            r"head.weight has shape \(256, 8\), and the settings make it \(256, 16\)",
        ),
        (change_settings(format=9), "format 9, and this version reads format 1"),
        (change_settings(weights_sha256=None), "weights_sha256 is missing or not a str"),
        (change_settings(config={"width": -1}), "config.width"),
        (change_settings(config={"widht": 16}), "config.widht"),
        (change_settings(config={"vocab_size": None}), "vocab_size must be a number"),
        (change_settings(config={"vocab_size": 100}), "256 ids, but the model knows only 100"),
    ],
)
def test_a_damaged_folder_is_refused_with_one_line_that_names_the_damage(tmp_path, damage, complaint):
    save(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=complaint) as refusal:
        load_model_folder(tmp_path / "m")
    assert "\n" not in str(refusal.value)


def test_without_verification_a_changed_weight_goes_unnoticed(tmp_path):
    save(tmp_path / "m")
    flip_a_bit(tmp_path / "m")
    load_model_folder(tmp_path / "m", verify=False)


def make_run(folder: Path) -> None:
    for step in (100, 200, 300):
        save(folder / "checkpoints" / f"step-{step:08d}" / "model", seed=step)
    (folder / "checkpoints" / "latest").write_text("step-00000300\n")


def test_a_model_is_found_from_its_folder_its_checkpoint_and_its_run(tmp_path):
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    make_run(run)
    first, last = (checkpoints / f"step-{step:08d}" / "model" for step in (100, 300))
    assert find_model_folder(first) == first
    assert find_model_folder(first.parent) == first
    assert find_model_folder(run) == last
    assert find_model_folder(checkpoints) == last
    (checkpoints / "best").write_text("step-00000100")
    assert find_model_folder(run) == first
    assert find_model_folder(checkpoints) == first


def test_where_no_model_is_the_places_looked_at_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_model_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no model found .*checkpoints/best and checkpoints/latest"):
        find_model_folder(tmp_path)
    for name in ("step-00000001", "", "../elsewhere"):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(UserError, match=f"latest: names '{name}', but there is no"):
            find_model_folder(tmp_path)


def test_an_export_is_the_same_model_in_a_folder_of_its_own(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out" / "model")]) == 0
    count = SpikeGPT(CONFIG).count_parameters()
    assert f"spikegpt, {count:,} parameters" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    exported = load_model_folder(tmp_path / "out" / "model")
    assert torch.equal(exported.model.head.weight, SpikeGPT(CONFIG, seed=300).head.weight)
    assert load_tokenizer(tmp_path / "out" / "model" / "tokenizer").sha256 == exported.tokenizer.sha256


def test_an_export_refuses_a_folder_in_use_and_a_damaged_model(tmp_path, capsys):
    save(tmp_path / "m")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "used")]) == 2
    assert "used: already exists and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    flip_a_bit(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "new")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
