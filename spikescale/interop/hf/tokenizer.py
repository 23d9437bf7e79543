"""The project's tokenizers as transformers' own kind: the same ids, saved as tokenizer.json."""

import json
from typing import TYPE_CHECKING, Any

from spikescale.data_pipeline.tokenizers.huggingface import FILE as HF_FILE
from spikescale.data_pipeline.tokenizers.huggingface import byte_level_alphabet

if TYPE_CHECKING:
    from spikescale.data_pipeline.tokenizers import Tokenizer

END, UNKNOWN = "<|endoftext|>", "<unk>"


def to_transformers(tokenizer: "Tokenizer") -> Any:
    """A PreTrainedTokenizerFast with the ids of `tokenizer`; None where there can be none.

    The end of a document begins and ends texts and pads them; as in spikescale, no text spells it. There is
    none for SentencePiece, syllables and conditions.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if HF_FILE in tokenizer.files and "+" not in tokenizer.kind:
        content = tokenizer.files[HF_FILE].decode("utf-8")
    elif tokenizer.kind == "byte":
        content = json.dumps(_byte_level(tokenizer.eos_id))
    elif tokenizer.kind == "char":
        content = json.dumps(_characters(tokenizer))
    else:
        return None
    made = tokenizers.Tokenizer.from_str(content)
    end = made.id_to_token(tokenizer.eos_id)
    special = {"eos_token": end, "bos_token": end, "pad_token": end}
    if tokenizer.kind == "char":
        special["unk_token"] = UNKNOWN
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **special,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


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
