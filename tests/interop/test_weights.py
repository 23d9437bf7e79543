"""Weights of other programs: recognised, converted exactly, and refused by name when they do not fit."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from interop_cases import VARIANTS, random_model, tiny
from safetensors.torch import load_file, save_file

from spikescale.cli.main import main
from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.interop.naming import BLINK, HF_RWKV, HF_SPIKEGPT, parameter_shapes
from spikescale.interop.save import rename
from spikescale.model import SpikeGPT
from spikescale.model.store import load_model_folder, save_model_folder


def weights_of(model: SpikeGPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(folder: Path, model: SpikeGPT) -> None:
    loaded = load_model_folder(folder)
    for name, weight in weights_of(model).items():
        assert torch.equal(dict(loaded.model.named_parameters())[name], weight), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_parameters_have_the_same_name_elsewhere(variant):
    names = parameter_shapes(tiny(variant))
    for naming in (BLINK, HF_RWKV, HF_SPIKEGPT):
        assert len({naming.theirs(name) for name in names}) == len(names)


def write_released(model: SpikeGPT, file: Path, prefix: str = "", **extra: object) -> None:
    weights = rename(weights_of(model), BLINK, torch.float32)
    torch.save({**{prefix + name: weight for name, weight in weights.items()}, **extra}, file)


def test_the_names_are_those_of_the_released_code():
    """Written out once more, from the released code: reading and writing could share a mistake."""
    expected = {
        "emb.weight": "embedding.weight",
        "blocks.0.ln0.weight": "blocks.0.ln0.weight",
        "blocks.1.ln1.weight": "blocks.1.ln1.weight",
        "blocks.1.ln2.bias": "blocks.1.ln2.bias",
        "blocks.1.att.time_decay": "blocks.1.time_mix.time_decay",
        "blocks.1.att.time_first": "blocks.1.time_mix.time_first",
        "blocks.1.att.time_mix_k": "blocks.1.time_mix.mu_key",
        "blocks.1.att.time_mix_v": "blocks.1.time_mix.mu_value",
        "blocks.1.att.time_mix_r": "blocks.1.time_mix.mu_receptance",
        "blocks.1.att.key.weight": "blocks.1.time_mix.key.weight",
        "blocks.1.att.value.weight": "blocks.1.time_mix.value.weight",
        "blocks.1.att.receptance.weight": "blocks.1.time_mix.receptance.weight",
        "blocks.1.att.output.weight": "blocks.1.time_mix.output.weight",
        "blocks.1.ffn.time_mix_k": "blocks.1.channel_mix.mu_key",
        "blocks.1.ffn.time_mix_r": "blocks.1.channel_mix.mu_receptance",
        "blocks.1.ffn.key.weight": "blocks.1.channel_mix.key.weight",
        "blocks.1.ffn.receptance.weight": "blocks.1.channel_mix.receptance.weight",
        "blocks.1.ffn.value.weight": "blocks.1.channel_mix.value.weight",
        "ln_out.weight": "ln_out.weight",
        "head.weight": "head.weight",
    }
    model = random_model(tiny())
    ours, theirs = weights_of(model), rename(weights_of(model), BLINK, torch.float32)
    for foreign, mine in expected.items():
        assert torch.equal(theirs[foreign].reshape(ours[mine].shape), ours[mine]), foreign


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_released_spikegpt_is_imported_with_and_without_a_wrappers_prefix(tmp_path, capsys, prefix):
    model = random_model(tiny())
    write_released(model, tmp_path / "SpikeGPT-216M.pth", prefix)
    names = set(torch.load(tmp_path / "SpikeGPT-216M.pth", weights_only=True))
    assert {f"{prefix}emb.weight", f"{prefix}blocks.0.ln0.bias", f"{prefix}blocks.2.att.time_mix_v"} <= names
    words = ["--variant", "spikegpt", "--tokenizer", "byte", "--output", str(tmp_path / "m")]
    assert main(["import", str(tmp_path / "SpikeGPT-216M.pth"), *words]) == 0
    said = capsys.readouterr().out
    assert "spikegpt, 3 layers, width 24, 256 symbols" in said
    assert "assumed embedding: float" in said and "assumed context length: 1024" in said
    assert_same(tmp_path / "m", model)
    loaded = load_model_folder(tmp_path / "m")
    assert loaded.config == tiny(context_length=1024)
    assert loaded.info["imported_from"] == "SpikeGPT-216M.pth"


def test_weights_within_a_trainers_file_and_of_old_torch_are_read(tmp_path):
    model = random_model(tiny("rwkv"))
    weights = rename(weights_of(model), BLINK, torch.float32)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    for name in ("a", "b"):
        words = ["--variant", "rwkv", "--tokenizer", "byte", "--output", str(tmp_path / name)]
        assert main(["import", str(tmp_path / f"{name}.pth"), *words]) == 0
        assert_same(tmp_path / name, model)


@pytest.mark.parametrize("kind", ["spikegpt", "rwkv4", "hf-rwkv"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_changes_no_bit(tmp_path, saved, kind, dtype):
    model, folder = saved(tiny("spikegpt" if kind == "spikegpt" else "rwkv"))
    model = model.to(getattr(torch, dtype)).float()
    shutil.rmtree(folder)
    model_folder = tmp_path / "exact"
    save_model_folder(model_folder, weights_of(model), model.config, make_tokenizer("byte"), {"step": 1})
    out, back, again = tmp_path / "out", tmp_path / "back", tmp_path / "again"
    assert main(["export", str(model_folder), str(out), "--format", kind, "--dtype", dtype]) == 0
    assert main(["import", str(out), "--output", str(back)]) == 0
    assert_same(back, model)
    assert load_model_folder(back).config.variant == model.config.variant
    assert load_model_folder(back).config.context_length == 32
    assert main(["export", str(back), str(again), "--format", kind, "--dtype", dtype]) == 0
    name = "model.safetensors" if kind == "hf-rwkv" else "model.pth"
    assert (out / name).read_bytes() == (again / name).read_bytes()


def test_a_rescaling_by_layers_is_undone(tmp_path, capsys):
    model = random_model(tiny("rwkv", layers=5))
    weights = rename(weights_of(model), BLINK, torch.bfloat16)
    for layer in range(5):
        for name in ("att.output", "ffn.value"):
            weights[f"blocks.{layer}.{name}.weight"] /= 2 ** (layer // 2)
    torch.save(weights, tmp_path / "a.pth")
    words = ["import", str(tmp_path / "a.pth"), "--tokenizer", "byte", "--rescaled-every", "2", "--output"]
    assert main([*words, str(tmp_path / "m"), "--variant", "rwkv"]) == 0
    assert_same(tmp_path / "m", model.bfloat16().float())
    assert main([*words, str(tmp_path / "n"), "--variant", "spikegpt"]) == 2
    assert "--rescaled-every 2: only rwkv can be rescaled" in capsys.readouterr().err


def test_large_models_are_written_and_read_in_several_files(tmp_path, saved, capsys):
    model, folder = saved(tiny())
    out, whole = tmp_path / "sharded", tmp_path / "whole"
    assert main(["export", str(folder), str(out), "--max-shard-size", "40KB"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert not (out / "model.safetensors").exists()
    held = [load_file(out / name) for name in names]
    assert sum(len(part) for part in held) == len(list(model.parameters()))
    sizes = [sum(t.numel() * 4 for t in part.values()) for part in held]
    assert all(size <= 40_000 or len(part) == 1 for size, part in zip(sizes, held, strict=True))
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same(out, model)
    assert main(["export", str(out), str(whole)]) == 0
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    # Every file is checked, and every file is needed.
    content = bytearray((out / names[1]).read_bytes())
    content[-1] ^= 1
    (out / names[1]).write_bytes(content)
    assert main(["generate", str(out)]) == 2
    assert f"{names[1]}: damaged, its SHA-256 is" in capsys.readouterr().err
    (out / names[1]).unlink()
    assert main(["generate", str(out)]) == 2
    assert f"{names[1]}: no such file" in capsys.readouterr().err


def test_sharded_weights_of_transformers_are_imported(tmp_path, saved):
    model, folder = saved(tiny("rwkv"))
    assert (
        main(["export", str(folder), str(tmp_path / "hf"), "--format", "hf-rwkv", "--max-shard-size", "50KB"])
        == 0
    )
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "m")]) == 0
    assert_same(tmp_path / "m", model)


def test_pickled_shards_of_transformers_are_imported(tmp_path):
    model = random_model(tiny("rwkv"))
    weights = rename(weights_of(model), HF_RWKV, torch.float32)
    names = sorted(weights)
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: weights[name] for name in part}, tmp_path / file)
    places = {name: file for file, part in halves.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    words = ["import", str(tmp_path), "--tokenizer", "byte", "--output", str(tmp_path / "m")]
    assert main(words) == 0
    assert_same(tmp_path / "m", model)


class Shell:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({"emb.weight": torch.ones(2, 2), "x": Shell()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Shell()))
    for name in ("a", "b"):
        assert main(["import", str(tmp_path / f"{name}.pth"), "--output", str(tmp_path / "m")]) == 2
        captured = capsys.readouterr()
        assert "not readable as weights" in captured.err and captured.err.count("\n") == 1
        assert "executed" not in captured.out


def changed(**changes: torch.Tensor | None):
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, value in changes.items():
            if value is None:
                del weights[name.replace("__", ".")]
            else:
                weights[name.replace("__", ".")] = value

    return change


BAD = [
    (changed(head__weight=None), "lacks tensor head.weight"),
    (changed(emb__weight=None), "lacks tensor emb.weight"),
    (changed(blocks__1__ln2__bias=None), "lacks tensor blocks.1.ln2.bias"),
    (changed(extra=torch.ones(1)), "has unexpected tensor extra"),
    (changed(head_q__weight=torch.ones(1)), "head_q.weight (the query-key head"),
    (changed(blocks__0__att__ln_x__weight=torch.ones(24)), "(RWKV-5 and later are other models)"),
    (
        changed(blocks__2__ffn__key__weight=torch.ones(84, 24)),
        "ffn.key.weight has shape (84, 24); a model of 3 layers, width 24 and 256 symbols has (96, 24)",
    ),
    (changed(blocks__0__ffn__value__weight=torch.ones(96, 24)), "has (24, 96)"),
    (changed(blocks__0__att__time_mix_k=torch.ones(1, 1, 23)), "shape (1, 1, 23)"),
    (changed(head__weight=torch.ones(255, 24)), "head.weight has shape (255, 24)"),
    (
        changed(ln_out__weight=torch.full((24,), float("nan"))),
        "ln_out.weight holds infinities or what is no number",
    ),
    (changed(ln_out__weight=torch.ones(24, dtype=torch.int64)), "ln_out.weight is int64"),
]


@pytest.mark.parametrize(("change", "complaint"), BAD)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, capsys, change, complaint):
    weights = rename(weights_of(random_model(tiny())), BLINK, torch.float32)
    change(weights)
    torch.save(weights, tmp_path / "a.pth")
    words = ["--variant", "spikegpt", "--tokenizer", "byte", "--output", str(tmp_path / "m")]
    assert main(["import", str(tmp_path / "a.pth"), *words]) == 2
    said = capsys.readouterr().err
    assert complaint in said and "a.pth" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_what_the_files_do_not_tell_must_be_said(tmp_path, capsys):
    write_released(random_model(tiny()), tmp_path / "a.pth")
    words = ["import", str(tmp_path / "a.pth"), "--output", str(tmp_path / "m")]
    for options, complaint in (
        ([], "say --variant spikegpt for a released SpikeGPT, --variant rwkv for an RWKV-4"),
        (["--variant", "spikegpt"], "say --tokenizer; models of 256 symbols mostly go with --tokenizer byte"),
        (["--variant", "spikegpt", "--tokenizer", "char"], "is learnt from text"),
        (["--variant", "rwkv", "--tokenizer", "byte", "--embedding", "binary"], "rwkv has no neurons"),
        (["--variant", "rwkv", "--context-length", "0"], "--context-length 0: must be a positive number"),
        (["--max-shard-size", "5 apples"], "size '5 apples': write a number of bytes"),
    ):
        assert main([*words, *options]) == 2
        said = capsys.readouterr().err
        assert complaint in said and said.count("\n") == 1
    assert main([*words, "--variant", "spikegpt", "--tokenizer", "byte", "--embedding", "binary"]) == 0
    assert load_model_folder(tmp_path / "m").config.binary_embedding


def test_files_that_are_no_weights_are_refused(tmp_path, capsys):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("weights")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save({"a.b": torch.ones(3)}, tmp_path / "other.pth")
    torch.save({"emb.weight": torch.ones(3, 2), "_strategy": "cpu fp32"}, tmp_path / "converted.pth")
    save_file({"x": torch.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-3])
    (tmp_path / "folder").mkdir()
    for name, complaint in (
        ("empty.pth", "is empty"),
        ("text.pth", "not readable as weights"),
        ("tensor.pth", "holds a Tensor, not tensors by name"),
        ("other.pth", "tensors are named like a.b; known are"),
        ("other.safetensors", "tensors are named like x"),
        ("converted.pth", "converted for the package rwkv"),
        ("cut.safetensors", "not a readable safetensors file"),
        ("folder", "holds no weights"),
        ("nowhere", "no such file or folder"),
    ):
        assert main(["import", str(tmp_path / name), "--output", str(tmp_path / "m")]) == 2
        said = capsys.readouterr().err
        assert complaint in said and name in said and said.count("\n") == 1


def test_models_that_the_other_program_could_not_run_are_not_exported(tmp_path, saved, capsys):
    _, driven = saved(tiny("spikegpt-driven"))
    _, slow = saved(ModelConfig.model_validate({**tiny().model_dump(), "neuron": {"tau": 3.0}}))
    _, graded = saved(tiny(neuron={"bits": 3}, layers=1))
    for folder, options, complaint in (
        (driven, ["--format", "rwkv4"], "variant is spikegpt-driven, and RWKV-4 has no neurons"),
        (driven, ["--format", "hf-rwkv"], "RWKV-4 has no neurons"),
        (driven, ["--format", "spikegpt"], "has no variant spikegpt-driven"),
        (slow, ["--format", "spikegpt"], "neuron.tau is 3.0; the released code has 2.0"),
        (graded, ["--format", "spikegpt"], "neuron.bits is 3; the released code has 1"),
        (slow, ["--dtype", "float16"], "the spikescale format is float32"),
        (slow, ["--format", "spikegpt", "--max-shard-size", "5GB"], "is one file"),
    ):
        assert main(["export", str(folder), str(tmp_path / "out"), *options]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_package_rwkv_reads_our_export_and_gets_the_same_logits(tmp_path, saved, monkeypatch, capsys):
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    package = pytest.importorskip("rwkv.model")
    model, folder = saved(tiny("rwkv"))
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "rwkv4"]) == 0
    theirs = package.RWKV(model=str(tmp_path / "out" / "model"), strategy="cpu fp32")
    tokens = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(0))
    state, logits = None, []
    for token in tokens.tolist():
        out, state = theirs.forward([token], state)
        logits.append(out)
    torch.testing.assert_close(torch.stack(logits), model(tokens[None])[0][0], rtol=1e-4, atol=1e-4)
