"""The project's tokenizers as transformers' own kind: the same ids, saved as tokenizer.json."""

import json
from typing import TYPE_CHECKING, Any

from spikescale.data_pipeline.tokenizers.huggingface import FILE as HF_FILE
from spikescale.data_pipeline.tokenizers.huggingface import PROBES, byte_level_alphabet
from spikescale.data_pipeline.tokenizers.sentence_piece import FILE as SENTENCE_PIECE_FILE

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer

END, UNKNOWN = "<|endoftext|>", "<unk>"


def to_transformers(tokenizer: "Tokenizer") -> Any:
    """A PreTrainedTokenizerFast with the ids of `tokenizer`; None where there can be none.

    The end of a document begins and ends texts and pads them; as in spikescale, no text spells it. There is
    none for SentencePiece's BPE, syllables and conditions. Raises ValueError if the ids of some difficult
    texts are not the same after all.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if HF_FILE in tokenizer.files and "+" not in tokenizer.kind:
        content = tokenizer.files[HF_FILE].decode("utf-8")
    elif tokenizer.kind == "byte":
        content = json.dumps(_byte_level(tokenizer.eos_id))
    elif tokenizer.kind == "char":
        content = json.dumps(_characters(tokenizer))
    elif tokenizer.kind == "sentencepiece":
        described = _unigram(tokenizer)
        if described is None:
            return None
        content = json.dumps(described)
    else:
        return None
    made = tokenizers.Tokenizer.from_str(content)
    end = made.id_to_token(tokenizer.eos_id)
    special = {"eos_token": end, "bos_token": end, "pad_token": end}
    if tokenizer.unk_id is not None:
        special["unk_token"] = made.id_to_token(tokenizer.unk_id)
    converted = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **special,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    for text in (*PROBES, f"a{end}b{end} {UNKNOWN} </s><unk> <0x41>"):
        if converted(text, add_special_tokens=False)["input_ids"] != tokenizer.encode(text):
            raise ValueError(f"the {tokenizer.kind} tokenizer's conversion gives other ids for {text!r}")
    return converted


def _described(model: dict[str, Any], ends: dict[str, int], **parts: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    empty = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "version": "1.0",
        **dict.fromkeys(empty),
        **parts,
        "added_tokens": [{"content": name, "id": number, **flags} for name, number in ends.items()],
        "model": model,
    }


def _byte_level(eos_id: int) -> dict[str, Any]:
    """Bytes as a BPE without merges, in GPT-2's alphabet; 0xFF, which no UTF-8 has, is the end."""
    vocabulary = {character: byte for character, byte in byte_level_alphabet().items() if byte != eos_id}
    model = {"type": "BPE", "vocab": {**vocabulary, END: eos_id}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _described(model, {END: eos_id}, pre_tokenizer=level, decoder=level)


def _characters(tokenizer: "Tokenizer") -> dict[str, Any]:
    (content,) = tokenizer.files.values()
    vocabulary = {character: rank for rank, character in enumerate(json.loads(content))}
    assert tokenizer.unk_id is not None
    ends = {END: tokenizer.eos_id, UNKNOWN: tokenizer.unk_id}
    model = {"type": "WordLevel", "vocab": {**vocabulary, **ends}, "unk_token": UNKNOWN}
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return _described(model, ends, pre_tokenizer=each, decoder={"type": "Fuse"})


def _unigram(tokenizer: "Tokenizer") -> dict[str, Any] | None:
    """A unigram model of SentencePiece with byte fallback; None for a BPE one, which tells no merges."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files[SENTENCE_PIECE_FILE])
    count = model.get_piece_size()
    odd = [model.is_control(n) or model.is_unknown(n) or model.is_byte(n) for n in range(count)]
    scores = [model.get_score(number) for number in range(count)]
    if all(score.is_integer() for score, special in zip(scores, odd, strict=True) if not special):
        return None  # BPE: ranks
    least = min(score for score, special in zip(scores, odd, strict=True) if not special)
    # What a text may spell must be no piece. Names with a space never are, as spaces become U+2581 first;
    # a byte piece's name is cut after its first character.
    ends = {f" {model.id_to_piece(number)}": number for number in (model.unk_id(), model.eos_id())}
    names = {number: name for name, number in ends.items()}
    vocabulary = [
        [names.get(number) or model.id_to_piece(number), least if odd[number] else scores[number]]
        for number in range(count)
    ]
    unigram = {"type": "Unigram", "unk_id": model.unk_id(), "vocab": vocabulary, "byte_fallback": True}
    byte_name = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
    sign = "\u2581"
    parts = [
        {"type": "Replace", "pattern": {"String": sign}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return _described(
        unigram,
        ends,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": sign},
        pre_tokenizer={
            "type": "Split",
            "pattern": byte_name,
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        decoder={"type": "Sequence", "decoders": parts},
    )
