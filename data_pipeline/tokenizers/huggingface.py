"""Tokenizers in the tokenizer.json format: HF `tokenizers`, with `fastokens` as the fast path."""

import itertools
import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from spikescale.data_pipeline.tokenizers.base import StreamDecoder, Tokenizer
from spikescale.errors import UserError

FILE = "tokenizer.json"
Fast = Literal["auto", "require", "off"]
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")
# Encoded beside the sample of the corpus when the fast path is checked: white space, other scripts,
# unusual characters, and (added there) the literal names of special tokens.
PROBES = (
    "",
    " ",
    "\n\n\n  \t x\r\n",
    "  two  spaces   and\u00a0more\u2003",
    "na\u00efve cafe\u0301 \u00c5 \ufb01 \u1e9e",
    "\u4f60\u597d\uff0c\u4e16\u754c 123,456.78e-9",
    "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f469\u200d\U0001f52c\U0001f1e9\U0001f1ea \u200b\ufeff\u0000\u0007 I'm you're IT'S",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}\n",
)

logger = logging.getLogger(__name__)


class HuggingFaceTokenizer(Tokenizer):
    """Any deterministic tokenizer.json.

    Special tokens spelled in a text are encoded as ordinary text (`encode_special_tokens`), so that
    a document cannot contain an end of document; where the model would find one all the same, the
    text is cut inside the name and its parts are encoded one by one. Truncation, padding and
    templates are not applied.

    Args:
        content: the file.
        kind: how it is called: gpt2, neox, or tokenizer.json.
        eos: the text of the end-of-document token; None finds one by its usual names.
    """

    def __init__(self, content: bytes, kind: str = "tokenizer.json", eos: str | int | None = None) -> None:
        import tokenizers

        try:
            described = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(
                f"tokenizer {kind}: not a tokenizer.json ({' '.join(str(error).split())})"
            ) from None
        if described["model"].get("dropout"):
            raise UserError(f"tokenizer {kind}: its BPE dropout makes ids random; set model.dropout to null")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._described: dict[str, Any] = described
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        vocab_size = max(vocabulary.values()) + 1
        added = {entry["content"]: entry for entry in described.get("added_tokens") or []}
        self._specials = {entry["id"] for entry in added.values() if entry["special"]}
        self._added = {entry["id"]: name for name, entry in added.items()}
        eos_id = eos if isinstance(eos, int) else self._find_eos(kind, vocabulary, added, eos)
        self._fast: Any = None
        self._forbidden = self._reachable_specials()
        unknown = described["model"].get("unk_id")  # of unigram models; the others name it
        if unknown is None and described["model"].get("unk_token") is not None:
            unknown = vocabulary.get(described["model"]["unk_token"])
        self.unk_id = unknown
        super().__init__(kind, vocab_size, eos_id, {FILE: content})

    @staticmethod
    def _find_eos(kind: str, vocabulary: dict[str, int], added: dict[str, Any], eos: str | None) -> int:
        if eos is not None:
            if eos not in vocabulary:
                raise UserError(f"tokenizer {kind}: has no token {eos!r} to end documents with (--eos)")
            return vocabulary[eos]
        for name in EOS_NAMES:
            if name in added and added[name]["special"]:
                return vocabulary[name]
        raise UserError(
            f"tokenizer {kind}: none of {', '.join(EOS_NAMES)} is a special token in it: use --eos"
        )

    def _reachable_specials(self) -> np.ndarray:
        """Special tokens (but for the unknown one) that the model itself can find in a text.

        BPE reaches a token by merges alone, which special tokens have none of; unigram and word
        models look their whole vocabulary up.
        """
        model = self._described["model"]
        if model["type"] == "BPE" and not model.get("ignore_merges"):
            return np.zeros(0, dtype=np.int64)
        unknown = self._tokenizer.token_to_id(str(model.get("unk_token")))
        return np.array(sorted(self._specials - {unknown, model.get("unk_id")}), dtype=np.int64)

    @property
    def uses_fast_path(self) -> bool:
        """Whether texts are encoded by fastokens."""
        return self._fast is not None

    def use_fast_path(self, mode: Fast, sample: Sequence[str] | None) -> bool:
        """Switch to fastokens if it is there and gives the same ids as HF on `sample` and the probes.

        `sample` None skips the comparison, for a process whose parent has made it. With `auto` a
        refusal is announced once; with `require` it is a UserError; `off` does nothing. Returns
        whether the fast path is in use.
        """
        if mode == "off":
            return False
        reason = self._fast_path_reason(sample)
        if reason is not None:
            if mode == "require":
                raise UserError(f"--fast require: {reason}")
            logger.warning("encoding with HF tokenizers, the slow path: %s", reason)
        return self._fast is not None

    def _fast_path_reason(self, sample: Sequence[str] | None) -> str | None:
        try:
            import fastokens
        except ImportError as error:
            return f"fastokens is not installed ({error})"
        try:
            self._fast = fastokens.Tokenizer.from_json_str(self.files[FILE].decode("utf-8"))
            # As with HF, the file's own truncation and padding are not applied.
            self._fast.no_truncation()
            self._fast.no_padding()
        except Exception as error:  # whatever the Rust library objects to
            self._fast = None
            return f"fastokens does not read this tokenizer ({' '.join(str(error).split())})"
        if sample is None:
            return None
        specials = [self._added[token_id] for token_id in sorted(self._specials)]
        spelled = ["".join(f"a {name}{name} b{name[:-1]}\n" for name in specials)]
        texts = [*sample, *PROBES, *spelled]
        for text, fast in zip(texts, self._fast_arrays(texts), strict=True):
            if fast.tolist() != self._slow_ids([text])[0]:
                self._fast = None
                return f"fastokens gives other ids than HF for {text[:60]!r}"
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as integer arrays."""
        arrays = self._arrays(texts)
        if len(self._forbidden) and arrays and np.isin(np.concatenate(arrays), self._forbidden).any():
            for number, ids in enumerate(arrays):
                if np.isin(ids, self._forbidden).any():
                    arrays[number] = np.concatenate(self._arrays(self._broken_up(texts[number])))
        return arrays

    def _broken_up(self, text: str) -> list[str]:
        """The text in pieces none of which spells a forbidden token: cut after its first character."""
        names = [re.escape(self._added[token_id]) for token_id in self._forbidden.tolist()]
        cuts = [match.start() + 1 for match in re.finditer(f"(?=(?:{'|'.join(names)}))", text)]
        return [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]

    def _arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._fast is None:
            return [np.asarray(ids, dtype=np.int64) for ids in self._slow_ids(texts)]
        return self._fast_arrays(texts)

    def _slow_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def _fast_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        flat, bounds = np.frombuffer(ids, dtype=np.uint32), np.frombuffer(offsets, dtype=np.uint64).tolist()
        return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]

    @property
    def is_byte_level(self) -> bool:
        """Whether every token stands for definite bytes, as in GPT-2 and its kin."""
        return (self._described.get("decoder") or {}).get("type") == "ByteLevel"

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return byte_level_alphabet()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level vocabulary; otherwise its text decoded alone."""
        if token_id == self.eos_id or token_id in self._specials:
            return b""
        if not self.is_byte_level:
            return str(self._tokenizer.decode([token_id])).encode("utf-8")
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else bytes(self._byte_of[character] for character in token)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for."""
        if self.is_byte_level:
            return super().decode_bytes(ids)
        return self.decode(ids).encode("utf-8")

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids stand for, special tokens left out."""
        if self.is_byte_level:
            return super().decode(ids)
        kept = [int(token_id) for token_id in ids if token_id != self.eos_id]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True))

    def stream_decoder(self) -> StreamDecoder:
        """Bytewise where tokens are bytes, else by HF's own incremental decoder."""
        return super().stream_decoder() if self.is_byte_level else _TextStreamDecoder(self)


class _TextStreamDecoder:
    """Incremental decoding where a token's text depends on its neighbours (spacing, byte pieces).

    Decodes a short tail twice, with and without the new id, and emits the difference.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._tail = 0  # first id of the context
        self._emitted = 0  # first id whose text is not out yet

    def push(self, token_id: int) -> str:
        """See StreamDecoder."""
        self._ids.append(int(token_id))
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._tail, self._emitted = self._emitted, len(self._ids)
        return text

    def finish(self) -> str:
        """See StreamDecoder."""
        text = self._new_text()
        self._emitted = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._tail : self._emitted])
        return self._tokenizer.decode(self._ids[self._tail :])[len(before) :]


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2, Radford et al. 2019).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


def gpt2_tokenizer_json(vocabulary: bytes, merges: bytes) -> bytes:
    """The tokenizer.json of GPT-2's encoder.json and vocab.bpe."""
    ids = json.loads(vocabulary)
    lines = [line for line in merges.decode("utf-8").split("\n") if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"content": "<|endoftext|>", "id": ids["<|endoftext|>"], "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [line.split(" ") for line in lines],
        },
    }
    return json.dumps(described, ensure_ascii=False).encode("utf-8")
