#   docker build --target cuda -t spikescale:cuda .
#   docker build --target cpu  -t spikescale:cpu  .
#
# launch/ and configs/ are in /opt/spikescale; data/ and runs/ go to /workspace, best a named volume:
#
#   run="docker run --rm --gpus all --ipc host --volume spikescale:/workspace spikescale:cuda"
#   $run spikescale data prepare --source shakespeare --tokenizer byte --output data/shakespeare-byte
#   $run deepspeed /opt/spikescale/launch/pretrain.py --config /opt/spikescale/configs/run/shakespeare.yaml
#
# TORCH_INDEX is the package index that torch is taken from; for cuda pip's own, for cpu PyTorch's of CPU builds. DeepSpeed compiles its
# operators with the image's CUDA, whose major version must be the one that torch was built with.

ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG CPU_IMAGE=python:3.12-slim-bookworm

# The package as a wheel, so that no source tree and no build tool is copied into what runs.
FROM ${CPU_IMAGE} AS wheel
WORKDIR /source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY spikescale spikescale
COPY kernels kernels
COPY data_pipeline data_pipeline
COPY configs configs
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${CUDA_IMAGE} AS cuda
# The compiler stays: the kernels and DeepSpeed's optimizers are compiled at first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ git libaio-dev numactl python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.13,<2.14"
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install "$(echo /wheels/spikescale-*.whl)[gpu]"
COPY launch /opt/spikescale/launch
COPY configs /opt/spikescale/configs
RUN useradd --create-home --uid 10001 spikescale \
    && install -d --owner spikescale --group spikescale /workspace
USER spikescale
WORKDIR /workspace
CMD ["spikescale", "doctor"]

FROM ${CPU_IMAGE} AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libaio-dev numactl \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DS_ACCELERATOR=cpu
RUN python -m venv /opt/venv
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==2.13.0+cpu"
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install "$(echo /wheels/spikescale-*.whl)"
COPY launch /opt/spikescale/launch
COPY configs /opt/spikescale/configs
RUN useradd --create-home --uid 10001 spikescale \
    && install -d --owner spikescale --group spikescale /workspace
USER spikescale
WORKDIR /workspace
CMD ["spikescale", "doctor"]
