"""SpikeGPT as transformers' classes: the same logits, the state as cache, padding that leaves no trace."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interop_cases import VARIANTS, random_model, tiny
from safetensors.torch import load_file

from spikescale.cli.main import main
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError
from spikescale.model.store import load_model_folder, save_model_folder

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("spikescale.interop.hf")

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 255}


def causal(variant: str = "spikegpt", **changes: object):
    return hf.SpikeGPTForCausalLM.from_spikegpt(random_model(tiny(variant, **changes)))


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 255, (1, length), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Rows of several lengths in one batch; what stands at padding is no text of the model's."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), longest), 77)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[index, place], mask[index, place] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_what_is_saved_is_loaded_by_the_auto_classes(tmp_path, variant):
    ours = random_model(tiny(variant))
    hf.SpikeGPTForCausalLM.from_spikegpt(ours).save_pretrained(tmp_path)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is hf.SpikeGPTForCausalLM
    assert not report["missing_keys"] and not report["unexpected_keys"]
    (tokens,) = prompts(9)
    assert torch.equal(loaded(tokens).logits, ours(tokens)[0])
    assert torch.equal(loaded.to_spikegpt()(tokens)[0], ours(tokens)[0])
    assert loaded.config.model_config() == ours.config
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(ours.head(base(tokens).last_hidden_state), ours(tokens)[0])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_greedy_generation_with_the_state_is_that_of_the_parallel_form(variant):
    model = causal(variant)
    (tokens,) = prompts(7)
    expected = tokens
    for _ in range(12):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(tokens, max_new_tokens=12, **GREEDY), expected)
    calls: list[int] = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[1]))
    model.generate(tokens, max_new_tokens=12, **GREEDY)
    assert calls == [7] + [1] * 11


@pytest.mark.parametrize("variant", ["spikegpt", "spikegpt-driven"])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(variant):
    model = causal(variant)
    rows = prompts(3, 11, 1, 8)
    batch = padded(rows, "left")
    logits = model(**batch).logits
    made = model.generate(**batch, max_new_tokens=8, **GREEDY)
    for index, row in enumerate(rows):
        alone = model(row).logits
        torch.testing.assert_close(logits[index, -row.shape[1] :], alone[0], rtol=1e-5, atol=1e-5)
        expected = model.generate(row, max_new_tokens=8, **GREEDY)[0, row.shape[1] :]
        assert torch.equal(made[index, 11:], expected), index
    # Without the mask the padding is text, and is seen.
    polluted = model(batch["input_ids"]).logits
    assert (polluted[2, -1] - model(rows[2]).logits[0, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_end_of_a_document_clears_the_state_where_the_settings_say_so():
    end = 9
    ours = random_model(tiny("spikegpt", reset_at_documents=True))
    model = hf.SpikeGPTForCausalLM.from_spikegpt(ours, eos_token_id=end)
    rows = prompts(6, 11)
    rows[0][0, 3] = rows[1][0, 0] = rows[1][0, 7] = end
    for row in rows:
        assert torch.equal(model(row).logits, ours(row, reset=row == end)[0])
    # Of a batch with padding, and token by token with the state.
    batch = padded(rows, "left")
    logits = model(**batch).logits
    cache = hf.RecurrentCache()
    steps = [model(rows[1][:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(11)]
    for found, row in ((logits[0, -6:], rows[0]), (logits[1], rows[1]), (torch.cat(steps, 1)[0], rows[1])):
        torch.testing.assert_close(found, ours(row, reset=row == end)[0][0], rtol=1e-5, atol=1e-5)
    assert (ours(rows[1])[0] - model(rows[1]).logits).abs().max() > 1e-2
    # Several ids may end a text; without any, the state could not be cleared.
    several = hf.SpikeGPTForCausalLM.from_spikegpt(ours, eos_token_id=[end, 4])
    row = torch.tensor([[1, 4, 2, end, 3]])
    assert torch.equal(several(row).logits, ours(row, reset=(row == end) | (row == 4))[0])
    with pytest.raises(UserError, match=r"config.json: eos_token_id is not set.*reset_at_documents"):
        hf.SpikeGPTForCausalLM.from_spikegpt(ours)
    plain = causal("spikegpt", reset_at_documents=False)
    plain.config.eos_token_id = end
    assert torch.equal(plain(rows[1]).logits, ours(rows[1])[0])


@torch.no_grad()
def test_beams_samples_chunks_and_a_given_cache_go_by_the_state():
    model = causal("spikegpt-b")
    batch = padded(prompts(5, 9), "left")
    for options in (
        {"num_beams": 3, "num_return_sequences": 2, **GREEDY},
        {"num_beams": 2, "do_sample": True, "eos_token_id": None, "pad_token_id": 255},
        {"num_return_sequences": 3, "do_sample": True, "eos_token_id": None, "pad_token_id": 255},
    ):
        made = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            made.append(model.generate(**batch, max_new_tokens=7, use_cache=use_cache, **options))
        assert torch.equal(*made), options
    expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, prefill_chunk_size=2, **GREEDY), expected)
    # A conversation goes on from the cache of its first half.
    (tokens,) = prompts(6)
    cache = hf.RecurrentCache()
    first = model.generate(tokens, max_new_tokens=3, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 8
    longer = torch.cat([first, tokens], dim=1)
    assert torch.equal(
        model.generate(longer, max_new_tokens=3, past_key_values=cache, **GREEDY),
        model.generate(longer, max_new_tokens=3, **GREEDY),
    )


def test_the_cache_is_repeated_selected_and_never_cropped():
    model = causal()
    cache = model(torch.cat(prompts(4, 4)), use_cache=True).past_key_values
    before = [block["time_neuron"].clone() for block in cache.state]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    assert all(torch.equal(b["time_neuron"], v.flip(0)) for b, v in zip(cache.state, before, strict=True))
    cache.crop(4)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)
    cache.reset()
    assert cache.state is None and cache.get_seq_length() == 0


def test_what_would_pollute_the_state_is_refused():
    model = causal()
    with pytest.raises(ValueError, match="generation needs it on the left"):
        model.generate(**padded(prompts(3, 5), "right"), max_new_tokens=2, **GREEDY)
    ids = torch.ones(1, 5, dtype=torch.int64)
    for mask, complaint in (
        ([[1, 0, 1, 1, 1]], "padding within a text"),
        ([[0, 1, 0, 1, 1]], "padding within a text"),
        ([[1, 1]], "attention_mask has shape"),
    ):
        with pytest.raises(ValueError, match=complaint):
            model(ids, attention_mask=torch.tensor(mask))
    with pytest.raises(ValueError, match="inputs_embeds are not supported"):
        model(inputs_embeds=torch.ones(1, 2, 24))
    with pytest.raises(ValueError, match="keeps no hidden states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="its recurrent state"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", **GREEDY)
    with pytest.raises(UserError, match=r"config.json: spikescale.neuron.tau"):
        hf.SpikeGPTConfig(spikescale={"neuron": {"tau": 0.5}})
    with pytest.raises(UserError, match="tie_word_embeddings"):
        hf.SpikeGPTConfig(tie_word_embeddings=True)


def test_initial_weights_are_spikescales_and_follow_torchs_seed():
    config = hf.SpikeGPTConfig.from_model_config(tiny())
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(hf.SpikeGPTForCausalLM(config))
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    for name, reference in random_model(tiny(), seed=0).named_parameters():
        if name.endswith(("mu_key", "time_decay")):
            assert first[f"backbone.spikegpt.{name}"].shape == reference.shape
    decay = first["backbone.spikegpt.blocks.0.time_mix.time_decay"]
    assert decay[0] == -5 and decay[-1] == 3


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classes_are_of_the_text_alone_whatever_the_padding(tmp_path, side):
    causal("spikegpt").save_pretrained(tmp_path)
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    model, report = auto.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert report["missing_keys"] == {
        f"classifier.{layer}.{part}" for layer in ("dense", "out") for part in ("weight", "bias")
    }
    rows = prompts(2, 9, 5)
    logits = model.eval()(**padded(rows, side)).logits
    assert logits.shape == (3, 3) and logits.std() > 0.01
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index], model(row).logits[0], rtol=1e-4, atol=1e-5)
    hidden = model.backbone(rows[1]).last_hidden_state
    torch.testing.assert_close(logits[1], model.classifier(hidden.mean(1))[0], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "c")
    again = auto.from_pretrained(tmp_path / "c")
    assert torch.equal(again(rows[0]).logits, model(rows[0]).logits)
    with pytest.raises(ValueError, match="a text without tokens"):
        model(rows[0], attention_mask=torch.zeros_like(rows[0]))


def test_losses_are_those_of_the_labels():
    rows = torch.cat(prompts(6, 6))
    model = causal()
    logits = model(rows).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(model(rows, labels=rows).loss, expected)
    for kind, count, labels in (
        ("single_label_classification", 3, torch.tensor([0, 2])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
        ("regression", 1, torch.tensor([0.5, -1.0])),
    ):
        config = hf.SpikeGPTConfig.from_model_config(tiny(), num_labels=count)
        classifier = hf.SpikeGPTForSequenceClassification(config).eval()
        read = classifier(rows, labels=labels)
        logits = read.logits.detach()
        if kind == "single_label_classification":
            expected = -logits.log_softmax(1)[torch.arange(2), labels].mean()
        elif kind == "multi_label_classification":
            chances = logits.sigmoid()
            expected = -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean()
        else:
            expected = ((logits[:, 0] - labels) ** 2).mean()
        torch.testing.assert_close(read.loss.detach(), expected)
        read.loss.backward()
        assert classifier.backbone.spikegpt.embedding.weight.grad.abs().sum() > 0


def export(tmp_path: Path, *options: str) -> Path:
    made = make_tokenizer("byte")
    model = random_model(tiny("spikegpt", vocab_size=256))
    info = {"step": 1200, "valid_loss": 1.234567, "note": "a|<b>"}
    save_model_folder(tmp_path / "m", dict(model.named_parameters()), model.config, made, info)
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "hf"), "--format", "hf", *options]) == 0
    return tmp_path / "hf"


@torch.no_grad()
def test_an_exported_folder_runs_in_pipelines_and_comes_back(tmp_path):
    folder = export(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    loaded = load_model_folder(tmp_path / "m")
    ids = torch.tensor([loaded.tokenizer.encode("To be")])
    options = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    made = pipe(["To be", "Or not to be, that"], batch_size=2, **options)
    expected = ids
    for _ in range(10):
        expected = torch.cat([expected, loaded.model(expected)[0][:, -1:].argmax(-1)], dim=1)
        if expected[0, -1] == 255:
            break
    assert made[0][0]["generated_text"] == loaded.tokenizer.decode(expected[0, 5:].tolist())
    classify = transformers.pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    (scores,) = classify(["To be"])
    assert {entry["label"] for entry in scores} == {"LABEL_0", "LABEL_1"}
    assert sum(entry["score"] for entry in scores) == pytest.approx(1.0)
    # Back: the settings and the tokenizer lie in the folder.
    assert main(["import", str(folder), "--output", str(tmp_path / "back")]) == 0
    back = load_model_folder(tmp_path / "back")
    assert back.config == loaded.config and back.tokenizer.sha256 == loaded.tokenizer.sha256
    for mine, theirs in zip(back.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_model_card_says_what_the_run_says(tmp_path):
    folder = export(tmp_path)
    card = (folder / "README.md").read_text()
    count = sum(p.numel() for p in load_model_folder(tmp_path / "m").model.parameters())
    for line in (
        f"| parameters | {count:,} |",
        "| neurons | LIF, tau 2, threshold 1, reset to 0 |",
        "| step | 1,200 |",
        "| valid_loss | 1.23457 |",
        "| note | a\\|&lt;b> |",
        "| vocabulary | 256 (byte) |",
        "| embedding | float |",
    ):
        assert line in card.splitlines()


def test_shards_and_half_precision_are_loaded_in_float32(tmp_path):
    folder = export(tmp_path, "--dtype", "bfloat16", "--max-shard-size", "20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(load_model_folder(tmp_path / "m").model.named_parameters())
    assert torch.equal(model.lm_head.weight, weights["head.weight"].bfloat16().float())


ODD = "Hello  world\n\n x\r\nna\u00efve <|endoftext|> \u4f60\u597d \U0001f469\u200d\u00ff<unk></s><0x41>"


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece:400"])
def test_transformers_tokenizers_give_our_ids(tmp_path, kind):
    drawn = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "il", "on", "ur", "ick")]
    texts = [
        " ".join("".join(drawn.choices(syllables, k=drawn.randint(1, 4))) for _ in range(12))
        for _ in range(150)
    ]
    ours = make_tokenizer(kind, "Helo wrd\n<|endoftx>unk", texts=[*texts, "Hello  world\n"])
    model = random_model(tiny(vocab_size=max(256, ours.vocab_size), layers=1))
    save_model_folder(tmp_path / "m", dict(model.named_parameters()), model.config, ours, {})
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "hf"), "--format", "hf"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for piece in (ODD, "", " ", "\n", *texts, " ".join(texts)):
        assert theirs(piece)["input_ids"] == ours.encode(piece)
    plain = "Hello  world\n"
    assert theirs.decode(ours.encode(plain)) == plain
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id and theirs.padding_side == "left"


@pytest.mark.parametrize("spec", ["syllable:20", "sentencepiece:300:bpe"])
def test_a_tokenizer_that_transformers_has_not_is_kept_beside(tmp_path, spec):
    texts = ["one sentence of text", "and another one, which is longer and different"] * 200
    made = make_tokenizer(spec, set("".join(texts)), texts=texts, syllables={"one": 3, "text": 2})
    model = random_model(tiny(vocab_size=made.vocab_size))
    save_model_folder(tmp_path / "m", dict(model.named_parameters()), model.config, made, {})
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert 'load_tokenizer(Path(folder, "tokenizer"))' in (tmp_path / "hf" / "README.md").read_text()
    assert main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "back")]) == 0
    assert load_model_folder(tmp_path / "back").tokenizer.sha256 == made.sha256


def test_the_trainer_trains_both_models(tmp_path):
    pytest.importorskip("accelerate")
    tokens = torch.randint(0, 255, (16, 12), generator=torch.Generator().manual_seed(0))
    labelled = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]
    plain = [{"input_ids": row, "labels": row} for row in tokens]
    config = hf.SpikeGPTConfig.from_model_config(tiny("spikegpt", layers=1), num_labels=2)
    for kind, rows in ((hf.SpikeGPTForCausalLM, plain), (hf.SpikeGPTForSequenceClassification, labelled)):
        arguments = transformers.TrainingArguments(
            str(tmp_path / kind.__name__),
            max_steps=12,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            gradient_checkpointing=True,
            disable_tqdm=True,
            save_steps=12,
        )
        trainer = transformers.Trainer(kind(config), arguments, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.9 * before
        kept = kind.from_pretrained(tmp_path / kind.__name__ / "checkpoint-12")
        assert all(
            torch.equal(a, b) for a, b in zip(kept.parameters(), trainer.model.parameters(), strict=True)
        )


def test_interop_itself_imports_nothing_heavy():
    program = (
        "import sys, spikescale.interop.load, spikescale.interop.save, spikescale.cli.main;"
        "print([name for name in ('transformers', 'nir', 'datasets') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
