#!/usr/bin/env bash
# Installs a built tree into a directory of its own, and builds and runs the hosts against it.
#   run.sh BUILD_DIR [compiler flags for the hosts, such as -fsanitize=address]
set -euo pipefail
cd "$(dirname "$0")/../.."

build=$1
flags=${2:-}
work=$build/consumer
prefix=$PWD/$work/prefix
rm -rf "$work"
mkdir -p "$work"
cmake --install "$build" --prefix "$prefix" >"$work/install.log"

library=$(find "$prefix" -name 'libdeinfer.so*' -type f)
if ldd "$library" | grep -Ei 'torch|python'; then
  echo "$library must need neither torch nor Python" >&2
  exit 1
fi

compilers=(gcc clang)
# One compiler's sanitizer cannot look into what another has instrumented.
[ -n "$flags" ] && compilers=(gcc)
for cc in "${compilers[@]}"; do
  compiler=${cc/gcc/g}
  compiler=${compiler}++
  if ! command -v "$compiler" >/dev/null; then
    echo "consumer: no $compiler on this machine" >&2
    [ "${REQUIRE_CLANG:-0}" = 1 ] && exit 1
    continue
  fi
  echo "--- hosts by $compiler"
  cmake -S tests/consumer -B "$work/$compiler" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" \
    -DREADME="$PWD/README.md" -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_C_COMPILER="$cc" \
    -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_C_FLAGS="$flags" >"$work/$compiler.log"
  cmake --build "$work/$compiler"
  ctest --test-dir "$work/$compiler" --output-on-failure
done

echo "--- a host by pkg-config"
PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name deinfer.pc)")
export PKG_CONFIG_PATH
# shellcheck disable=SC2046
g++ -std=c++20 $flags examples/cpp/generate.cc -o "$work/generate" $(pkg-config --cflags --libs deinfer)
LD_LIBRARY_PATH=$(dirname "$library") "$work/generate" "$work/g++/checkpoint" --max-tokens 3 1,2,3
