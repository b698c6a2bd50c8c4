# TRL-VPO for NVIDIA GPUs: CUDA 13, with a compiler for DeepSpeed's and Triton's kernels.
#   docker build -t trl-vpo .
#   docker run --gpus all --ipc=host -v "$PWD":/data trl-vpo trl-vpo doctor rrpo/qwen2_5_vl_7b
#   docker run --gpus all --ipc=host -v "$PWD":/data -v ~/.cache/huggingface:/hub trl-vpo \
#     trl-vpo train rrpo --config rrpo/qwen2_5_vl_7b --dataset_name data/train.jsonl
# The driver must run CUDA 13 (`nvidia-smi` shows the newest that it can). --ipc=host: data loaders share memory.
# Not built by us: there was no Docker where this was written. The commands from `uv pip install` on were run without it.
FROM nvidia/cuda:13.1.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir uv==0.13.8
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH

WORKDIR /opt/trl-vpo
COPY pyproject.toml setup.py requirements.lock README.md LICENSE ./
COPY recipes recipes
COPY trl_vpo trl_vpo
# The locked versions of what is installed, and nothing else of the lock.
RUN uv pip install --no-cache -c requirements.lock '.[quantization,deepspeed,judge,smolvlm,tensorboard]'

ENV HF_HOME=/hub
WORKDIR /data
CMD ["trl-vpo", "--help"]
