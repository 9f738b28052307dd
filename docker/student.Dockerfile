# Students: DeepSpeed and nothing of the teacher's side. Neither Ray nor vLLM is installed, only the store's reader.
#
#     docker build --file docker/student.Dockerfile --tag decant-student:0.1.0 .
#
# The base is plain Python and no CUDA image: the wheels of PyTorch carry CUDA, cuDNN and NCCL. There is no nvcc: the
# trainer uses PyTorch's own AdamW, and DeepSpeed builds an operator only when a config asks for one (CPU or NVMe
# offload, fused optimizers of its own). Such a config needs nvcc on top of this image.
FROM python:3.11.15-slim-bookworm

# Triton compiles a small C launcher for each kernel of the loss.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# compute,utility: what a container must ask for to be given libcuda and nvidia-smi.
# XDG_CACHE_HOME, HF_HOME: downloaded models, on a volume that outlives the container.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

# `cpu` makes an image for machines without a GPU. It must be said: the machine that builds an image may have none.
ARG ACCELERATOR=cuda
ARG TORCH_INDEX=

# What is installed depends on these files alone. Empty packages stand in for the source, which is copied last, so that
# an edited line of Python does not fetch PyTorch again.
WORKDIR /opt/decant
COPY pyproject.toml README.md LICENSE ./
COPY docker/install.sh docker/install.sh
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir cluster logit_store training \
    && touch decant.py cluster/__init__.py logit_store/__init__.py training/__init__.py \
    && PYTHON=python ACCELERATOR=${ACCELERATOR} TORCH_INDEX=${TORCH_INDEX} bash docker/install.sh train report

# File systems beside the local one. s3fs is released together with fsspec and must have its version.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --quiet "s3fs==$(python -c 'import fsspec; print(fsspec.__version__)')"

COPY decant.py ./
COPY cluster cluster
COPY logit_store logit_store
COPY training training
COPY configs configs
# Installed once more: the packages are real now.
RUN python -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 1000 decant \
    && mkdir --parents runs /cache/huggingface \
    && chown --recursive decant:decant runs /cache

# Without an entry point of its own the image takes any command: `decant train CONFIG` on one machine,
# `deepspeed --module training train CONFIG` on several.
# The user is a number because Kubernetes checks runAsNonRoot against nothing else.
USER 1000
CMD ["decant", "--help"]
