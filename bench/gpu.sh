#!/usr/bin/env bash
# Builds for this machine's GPU, runs the GPU tests, compute-sanitizer and all benchmarks, inside ten minutes, without a network.
#
#   bench/gpu.sh            exit 0: all steps passed; 1: a step failed (the others still ran); 3: not run, there is no NVIDIA GPU
#
#   PYTHON=python3          the interpreter that has torch, triton, pytest, and for the peers transformers, diffusers, liger-kernel
#   GPU_SECONDS=570         time for everything; what is left after the tests goes to the benchmarks
#   GPU_PEERS=build/peers   folder of pure-Python wheels of peers that cannot be installed here; they are unpacked, not installed
#   SACCADE_GIT_SHA         the commit, where the tree came without its repository
#   OUT                     folder that gets results.tar.gz, logs.tar.gz, summary.txt and the pictures as well
set -uo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "not run: no NVIDIA GPU was found on this machine (nvidia-smi lists none)"
  exit 3
fi
python=${PYTHON:-python3}
total=${GPU_SECONDS:-570}
work=build/gpu
logs=$work/logs
site=$work/site
rm -rf "$logs" "$site"
mkdir -p "$logs" "$site" "$work/peers"
command -v nvcc >/dev/null || export PATH="$PATH:/usr/local/cuda/bin"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/$site:$PWD/$work/peers" TORCHINDUCTOR_CACHE_DIR="$PWD/$work/inductor"

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
case $capability in
  '' | *[!0-9]*) echo "not run: nvidia-smi does not tell the compute capability"; exit 3 ;;
  90) arch=90a-real ;; # the accelerated set of Hopper
  *) arch=$capability-real ;;
esac

summary=()
failed=0
left() { echo $((total - SECONDS)); }

# step NAME LIMIT COMMAND...: at most LIMIT seconds and what is left in all; output to its log, the end of it here where it fails.
step() {
  local name=$1 limit=$2 begin=$SECONDS code verdict
  shift 2
  (($(left) < limit)) && limit=$(left)
  if ((limit < 5)); then
    summary+=("$(printf '%-10s  not run: no time was left' "$name")")
    failed=1
    return 1
  fi
  echo "--- $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in
    0) verdict=passed ;;
    124 | 137) verdict="failed: ran past its $limit s" ;;
    *) verdict="failed: exit code $code" ;;
  esac
  summary+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - begin)) "$verdict")")
  if ((code != 0)); then
    failed=1
    tail -n 30 "$logs/$name.log"
  fi
  return $code
}

build() {
  set -e
  cp -r python/saccade "$site/"
  rm -rf "$site/saccade/_C.so" "$site/saccade/_no_binary.txt" "$site/saccade/_triton"
  cp -rL kernels/triton "$site/saccade/_triton" # where a wheel has it
  local torch
  torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
  cmake -S . -B "$work/cmake" -G Ninja -DSACCADE_CUDA=ON "-DSACCADE_CUDA_ARCHS=$arch" \
    "-DCMAKE_CUDA_ARCHITECTURES=$arch" "-DTORCH_DIR=$torch" \
    "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/$site/saccade"
  cmake --build "$work/cmake" --parallel "$(nproc)"
  "$python" -c '
import sys, torch, saccade
from saccade._load import BINARY
print(saccade.__file__, BINARY)
sys.exit(BINARY.problem or (None if BINARY.architectures else "built without CUDA"))'
}
export python work site arch
export -f build

for wheel in "${GPU_PEERS:-build/peers}"/*.whl; do
  [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$work/peers"
done

step build 180 bash -c build
# -m gpu: marked tests alone; an import that fails in one file must not stop the rest.
step tests 140 "$python" -m pytest -q -m gpu tests --continue-on-collection-errors -p no:cacheprovider
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck; do
  # Without torch's cache every tensor is an allocation of its own, so that one element beyond its end is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool 75 "$sanitizer" --tool $tool --error-exitcode 9 "$python" -m bench.sanitize
done
bench_time=$(($(left) - 95))
step bench "$bench_time" "$python" -m bench --device cuda --check --deadline $((bench_time - 45))
cat "$logs/bench.log" 2>/dev/null
step swap 80 "$python" -m bench.swap --device cuda --seconds 8 # whole models, stock against accelerated
cat "$logs/swap.log" 2>/dev/null

printf '%s\n' "${summary[@]}" | tee "$logs/summary.txt"
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cp "$logs/summary.txt" "$OUT/"
  tar -czf "$OUT/logs.tar.gz" -C "$logs" .
  gpu=$("$python" -c 'from bench.environment import device_slug; print(device_slug("cuda"))' 2>/dev/null)
  if [ -n "$gpu" ] && [ -d "bench/results/$gpu" ]; then
    tar -czf "$OUT/results.tar.gz" "bench/results/$gpu" bench/figures/"$gpu"*
    cp bench/figures/"$gpu"*.png "$OUT/" 2>/dev/null
  fi
fi
exit $failed
