"""Packaging of spikescale.

`kernels/`, `data_pipeline/` and `configs/` sit at the top of the repository and are imported as
`spikescale.kernels`, `spikescale.data_pipeline` and `spikescale.configs`, so that no generic name
lands in site-packages. The ranges below are the ones the test suite was run with.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def mapped_packages() -> tuple[list[str], dict[str, str]]:
    """Every package to install, and the folder that each import name comes from."""
    folders = {
        "spikescale": "spikescale",
        "spikescale.kernels": "kernels",
        "spikescale.data_pipeline": "data_pipeline",
    }
    names: list[str] = []
    for name, folder in folders.items():
        names.append(name)
        names += [f"{name}.{sub}" for sub in find_packages(str(ROOT / folder))]
    folders["spikescale.configs"] = "configs"
    names.append("spikescale.configs")
    return names, folders


packages, package_dir = mapped_packages()
GPU = ["triton>=3.9,<3.10", "flash-linear-attention>=0.6,<0.7"]
S3 = ["s3fs>=2026.9,<2027"]
# Models as transformers' classes, the driven variant as a NIR graph (docs/interoperability.md).
TRANSFORMERS = ["transformers>=5.23,<5.24", "accelerate>=1.15,<2"]
CLASSIFY = ["scikit-learn>=1.7,<1.10"]  # a baseline of docs/understanding.md
NIR = ["nir>=1.0.8,<1.1"]
EVAL = ["lm_eval>=0.4.13,<0.5"]  # `spikescale evaluate --tasks` (docs/evaluation.md)
INT8 = ["torchao>=0.18,<0.19"]
LORA = ["peft>=0.21,<0.22"]  # `spikescale finetune --method lora` (docs/finetuning.md)

setup(
    name="spikescale",
    version="0.1.0",
    description="Distributed pretraining of spiking language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "spikescale.configs": ["*/*.yaml"],
        "spikescale.kernels": ["*/*.cpp", "*/*.h", "*/README.md"],
        "spikescale.data_pipeline": ["*/*.yaml", "*/*/*.yaml"],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.17",
        "ray[client]>=2.60,<2.61",
        "datasets>=5.2,<6",
        "mlflow>=3.17,<3.18",
        "sentencepiece>=0.2.1,<0.3",
        "pyphen>=0.17,<0.18",
        "requests>=2.32,<3",
        "tokenizers>=0.23,<0.24",
        "fastokens>=0.3.5,<0.4",
        "omegaconf>=2.4,<2.5",
        "pydantic>=2.14,<3",
        "safetensors>=0.8,<0.9",
        "rich>=15,<16",
        "matplotlib>=3.10,<4",
        "numpy>=2.2,<3",
        "scipy>=1.15,<2",
        "pyarrow>=21,<26",
        "pyyaml>=6,<7",
        "zstandard>=0.25,<0.26",
        "orjson>=3.13,<4",
        "ninja>=1.13,<2",
        # Cleaning (docs/cleaning.md).
        "ftfy>=6.3,<7",
        "py3langid>=0.4,<0.5",
        "datasketch>=2.0,<2.1",
        # Sources and data by URL (docs/storage.md).
        "fsspec[http]>=2026.9,<2027",
    ],
    extras_require={
        "gpu": GPU,
        "s3": S3,
        "hf": TRANSFORMERS,
        "nir": NIR,
        "classify": CLASSIFY,
        "eval": EVAL,
        "int8": INT8,
        "lora": LORA,
        "gcs": ["gcsfs>=2026.9,<2027"],  # the same version as fsspec; not run against a server
        # Peers of benchmarks/train_step.py and streaming.py; a missing one is reported and skipped.
        "bench": [
            "transformers>=5.23,<5.24",  # GPT-2 and RWKV-4
            "spikingjelly>=2.0,<2.1; python_version >= '3.11'",  # its LIF node, train_step.py
            "rwkv>=0.8.32,<0.9",  # streaming.py
        ],
        # Triton kernels are interpreted and compiled ahead of time in tests, without a GPU, beside fla's.
        "dev": [
            *GPU,
            *S3,
            *TRANSFORMERS,
            *NIR,
            *CLASSIFY,
            # Neurons are compared with those of snnTorch and SpikingJelly, which also run NIR graphs. The
            # Makefile installs SpikingJelly without what it asks for: torchvision would replace torch.
            "snntorch>=1.0,<1.1",
            "nirtorch>=2.6,<2.7",
            "loguru>=0.7,<1",
            "SciencePlots>=2.2,<3",
            "rwkv>=0.8.32,<0.9",  # reads the RWKV-4 files that we write
            *EVAL,
            *INT8,
            *LORA,
            "moto[server]>=5.2,<6",  # the S3 server of tests
            "pytest>=9.2,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.17.6,<0.18",
            "mypy>=2.4,<3",
        ],
    },
    entry_points={"console_scripts": ["spikescale=spikescale.cli.main:entry"]},
)
