#!/usr/bin/env bash
# Makes the wheel and the source distribution, and uses the wheel as someone does who has just
# installed it: in an environment of its own, with no compiler in reach; then from C++.
#   run.sh PYTHON BUILD_DIR [DECOMPOSED_MODEL, else a tiny random one]
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$1
build=$2
work=$PWD/$build/packaging
model=${3:-$work/model}
rm -rf "$work"
mkdir -p "$work/empty"
if [ $# -lt 3 ]; then
  PYTHONPATH=tests/python "$python" - "$model" <<'EOF'
import sys
from pathlib import Path

from conftest import write_model, write_tokenizer

path = Path(sys.argv[1])
ranks = {"model.layers.0.self_attn.q_proj": 7, "model.layers.1.mlp.down_proj": 12}
write_model(path, write_tokenizer(path), ranks=ranks)
EOF
fi

echo "--- source distribution"
"$python" setup.py -q sdist --dist-dir "$work"
tar tzf "$work"/deinfer-*.tar.gz | sed 's,^[^/]*/,,' | sort >"$work/in_sdist"
# What git has, but for what CI and the results of benchmarks need.
git ls-files -co --exclude-standard | grep -vE '^(\.|bench/results/)' | sort >"$work/in_git"
if ! missing=$(comm -13 "$work/in_sdist" "$work/in_git") || [ -n "$missing" ]; then
  echo "not in the source distribution: $missing" >&2
  exit 1
fi

echo "--- wheel"
DEINFER_BUILD_DIR=$build "$python" -m pip wheel -q --no-build-isolation --no-deps -w "$work" .
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q "$work"/deinfer-*.whl
# An empty PATH but for the environment: no compiler, no cmake. Outside the source tree, so that
# only the wheel is there to be imported.
installed() { (cd "$work/empty" && env -i PATH="$work/venv/bin" HF_HUB_OFFLINE=1 "$@"); }
installed python - <<'EOF'
import sys
import time

start = time.perf_counter()
import deinfer

seconds = time.perf_counter() - start
assert seconds < 1.0, f"import deinfer took {seconds:.2f} s"
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert "site-packages" in deinfer.__file__, deinfer.__file__
EOF
installed deinfer generate "$model" --prompt "The sky is" --max-tokens 8 --temperature 0
installed deinfer info "$model" >/dev/null

echo "--- a C++ host by the wheel"
config=$(installed python -m deinfer --cmake-dir)
cmake -S examples/cpp -B "$work/example" -G Ninja -Ddeinfer_DIR="$config" >"$work/example.log"
cmake --build "$work/example"
"$work/example/generate" "$model" --max-tokens 4 1,2,3

if [ -e "$config/../../../libdeinfer_torch.so" ]; then
  echo "--- the wheel's torch ops, by the torch that they were built with"
  site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  (cd "$work/empty" && PYTHONPATH=$site "$python" - "$site") <<'PYTHON'
import sys

import torch

import deinfer

assert deinfer.__file__.startswith(sys.argv[1]), deinfer.__file__
x, v, u = torch.randn(3, 8), torch.randn(4, 8), torch.randn(6, 4)
torch.testing.assert_close(deinfer.torch_ops.lowrank_linear(x, v, u), x @ v.T @ u.T)
PYTHON
fi
