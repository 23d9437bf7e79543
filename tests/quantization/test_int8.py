"""Eight-bit models: the integers, the products, the folder, and what is refused."""

import json
import math

import pytest
import torch

from spikescale.cli.main import main
from spikescale.config import ModelConfig, NeuronConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.inference.decoder import obstacle_to_decoding
from spikescale.model import SpikeGPT
from spikescale.model.store import load_model_folder, save_model_folder
from spikescale.quantization import Quantization, apply_int8, is_quantized, quantized_tensors
from spikescale.quantization.folder import quantize_model_folder
from spikescale.quantization.int8 import matrix_bytes, reading_spikes

pytest.importorskip("torchao")


def make_model(variant="spikegpt", **changes):
    settings = {"layers": 2, "width": 32, "vocab_size": 256, "context_length": 32, **changes}
    model = SpikeGPT(ModelConfig(variant=variant, binary_embedding=variant != "rwkv", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() == 1 else 1 / math.sqrt(parameter.shape[1])
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_tokens():
    return torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(2))


def copied(model):
    other = SpikeGPT(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_integers_and_scales_are_those_of_the_largest_weight_of_a_row():
    model = make_model("rwkv")
    tensors = quantized_tensors(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(tensors[name], parameter.detach())
            continue
        scale = parameter.detach().abs().amax(1) / 127.5  # torchao divides the range of -128 to 127
        torch.testing.assert_close(tensors[f"{name}_scale"], scale, rtol=1e-6, atol=0)
        wanted = (parameter.detach() / scale[:, None]).round().clamp(-128, 127)
        assert tensors[name].dtype == torch.int8
        assert (tensors[name].float() - wanted).abs().max() <= 1  # a tie may round either way
        assert (tensors[name].float() == wanted).float().mean() > 0.98


def test_products_are_those_of_integers_for_floats_and_exact_for_spikes():
    model = make_model("spikegpt-b", neuron=NeuronConfig(v_threshold=0.3))
    tensors = quantized_tensors(model)
    apply_int8(model, tensors, Quantization())
    generator = torch.Generator().manual_seed(3)
    name = "blocks.1.channel_mix.value"
    assert reading_spikes(model) == {"blocks.0.channel_mix.value", name}
    stored, scale = tensors[f"{name}.weight"].float(), tensors[f"{name}.weight_scale"]
    graded = torch.randint(-7, 8, (1, 5, 128), generator=generator).float()
    with torch.no_grad():
        found = model.get_submodule(name)(graded)
    torch.testing.assert_close(found, (graded @ stored.T) * scale, rtol=1e-6, atol=1e-5)
    name = "blocks.1.channel_mix.key"
    stored, scale = tensors[f"{name}.weight"].float(), tensors[f"{name}.weight_scale"]
    projection = model.get_submodule(name)
    x = torch.randn(5, 32, generator=generator)
    per_token = x.abs().amax(1, keepdim=True) / 127.5
    rounded = (x / per_token).round().clamp(-128, 127)
    with torch.no_grad():
        found = projection(x)
    wanted = (rounded @ stored.T) * per_token * scale
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-3)
    assert (found - x @ (stored * scale[:, None]).T).abs().max() > 1e-3  # activations were rounded


@pytest.mark.parametrize("variant", ["rwkv", "spikegpt", "spikegpt-driven"])
@pytest.mark.parametrize("activations", ["token", "none"])
def test_a_quantised_model_is_close_and_has_all_forms(variant, activations):
    model = make_model(variant)
    quantised = copied(model)
    apply_int8(quantised, quantized_tensors(model), Quantization(activations=activations))
    assert is_quantized(quantised)
    assert not is_quantized(model)
    assert matrix_bytes(quantised) < 0.3 * matrix_bytes(model)
    tokens = some_tokens()
    with torch.no_grad():
        exact, found = model(tokens)[0], quantised(tokens)[0]
        state, pieces = None, []
        for piece in tokens.split(9, dim=1):
            logits, state = quantised(piece, state)
            pieces.append(logits)
    error = (found - exact).norm() / exact.norm()
    # One changed spike changes those after it: only the model without them is near throughout.
    assert 1e-4 < error < (0.05 if variant == "rwkv" else 0.6)
    torch.testing.assert_close(torch.cat(pieces, 1), found, rtol=1e-3, atol=1e-3)


def test_projections_that_read_spikes_are_found():
    driven = make_model("spikegpt-driven")
    assert len(reading_spikes(driven)) == 2 * 7 + 1
    assert reading_spikes(make_model("spikegpt")) == set()
    assert reading_spikes(make_model("spikegpt-driven", neuron=NeuronConfig(bits=8))) == set()
    # With weights that eight bits hold exactly, a driven model is the same to the spike.
    with torch.no_grad():
        for name, parameter in driven.named_parameters():
            if parameter.dim() == 2 and name != "embedding.weight":
                parameter.copy_((parameter * 8).round().clamp(-127, 127))
                parameter[:, 0] = 127.5  # so that the scale is 1; this weight itself becomes 127
    exact = copied(driven)
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if parameter.dim() == 2 and name != "embedding.weight":
                parameter.clamp_(-128, 127)
    apply_int8(driven, quantized_tensors(driven), Quantization())
    with torch.no_grad():
        torch.testing.assert_close(driven(some_tokens())[0], exact(some_tokens())[0], rtol=1e-4, atol=1e-3)


def test_a_binary_embedding_keeps_its_signs_whatever_their_size():
    model = make_model()
    with torch.no_grad():
        model.embedding.weight[0] = torch.linspace(-1e-9, 1e-9, 32)
        model.embedding.weight[0, 5] = 3.0
    quantised = copied(model)
    apply_int8(quantised, quantized_tensors(model), Quantization())
    tokens = torch.arange(256)[None]
    assert torch.equal(quantised.embedding(tokens), model.embedding(tokens))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = make_model()
    save_model_folder(folder / "whole", model.state_dict(), model.config, make_tokenizer("byte"), {"step": 7})
    sizes = quantize_model_folder(folder / "whole", folder / "int8", Quantization())
    return folder, model, sizes


def test_the_folder_gives_back_the_model(folders):
    folder, model, sizes = folders
    loaded = load_model_folder(folder / "int8")
    assert loaded.info == {"step": 7}
    expected = copied(model)
    apply_int8(expected, quantized_tensors(model), Quantization())
    with torch.no_grad():
        assert torch.equal(loaded.model(some_tokens())[0], expected(some_tokens())[0])
    assert sizes["int8_bytes"] == (folder / "int8" / "model.safetensors").stat().st_size
    assert sizes["float32_bytes"] > 3 * sizes["int8_bytes"]
    assert "8-bit" in obstacle_to_decoding(loaded.model)


def test_commands_read_it_and_what_they_cannot_do_is_said(folders, tmp_path, capsys):
    folder, _, _ = folders
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 3)
    words = ["quantize", str(folder / "whole"), "--output", str(tmp_path / "out")]
    assert main([*words, "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tokens_scored"] == 126  # of 130 tokens in windows of 33, each one's first is not predicted
    assert shown["int8_bits_a_token"] == pytest.approx(shown["float32_bits_a_token"], rel=0.1)
    assert 0 < shown["spikes_changed"] < 0.2
    assert main(["generate", str(tmp_path / "out"), "--tokens", "5"]) == 0
    capsys.readouterr()
    for refused, complaint in (
        (["generate", str(tmp_path / "out"), "--engine", "native"], "8-bit integers"),
        (["quantize", str(tmp_path / "out"), "--output", str(tmp_path / "again")], "8-bit weights already"),
        (["quantize", str(folder / "whole"), "--output", str(tmp_path / "out")], "already exists"),
        ([*words[:2], "--output", str(tmp_path / "n"), "--text", str(tmp_path / "no.txt")], "cannot be read"),
    ):
        assert main(refused) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_damaged_folders_are_refused_in_one_line(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder, _, _ = folders

    def changed(name, change):
        shutil.copytree(folder / "int8", tmp_path / name)
        settings = json.loads((tmp_path / name / "model.json").read_text())
        tensors = load_file(tmp_path / name / "model.safetensors")
        change(settings, tensors)
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "model.json").write_text(json.dumps(settings))
        return tmp_path / name

    cases = {
        "lacks tensor head.weight_scale": lambda s, t: t.pop("head.weight_scale"),
        "has unexpected tensor extra": lambda s, t: t.__setitem__("extra", torch.zeros(1)),
        r"head\.weight is torch\.float32": lambda s, t: t.__setitem__("head.weight", torch.zeros(256, 32)),
        r"quantization\.weights": lambda s, t: s["quantization"].__setitem__("weights", "int3"),
        "quantization is missing": lambda s, t: s.pop("quantization"),
    }
    for number, (complaint, change) in enumerate(cases.items()):
        with pytest.raises(UserError, match=complaint):
            load_model_folder(changed(f"case{number}", change), verify=False)
    with pytest.raises(UserError, match="damaged"):
        load_model_folder(changed("case-sum", lambda s, t: t["ln_out.bias"].add_(1)))
    broken = make_model()
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"head\.weight: holds numbers that are not finite"):
        quantized_tensors(broken)
