#!/usr/bin/env bash
# Runs the kernels' tests under NVIDIA's compute-sanitizer: all of them by memcheck and racecheck, a few small cases of
# every kernel by initcheck. Appends a record to benchmarks/results/sanitizers.jsonl (or to file $1). Fails unless all
# three are clean.
# racecheck looks at shared memory only: races between programs are what the fuzzing of merged results would show.
# initcheck runs where no other library's kernels do: it misses what some of cuBLAS's kernels write, and reports torch's
# for reading that.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/sanitizers.jsonl}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
declare -A cases=([initcheck]=tests/test_unwritten_memory.py)
cases[memcheck]="tests/test_unwritten_memory.py tests/test_linear.py tests/test_kernels.py"
cases[racecheck]=${cases[memcheck]}
declare -A only=([racecheck]='--kernel-regex kns=^[a-z_]+_kernel$')  # ours: names of C++ are mangled; ten times as fast

command -v compute-sanitizer > /dev/null || {
  echo "sanitize: compute-sanitizer is not on the PATH: it comes with NVIDIA's CUDA toolkit" >&2
  exit 2
}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$logs/triton}
python3 -m pytest -q -n 8 ${cases[memcheck]}  # compiles, which a sanitizer would make slow
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor is an allocation of its own, so that its bounds are known
watch() {
  local tool=$1 begun=$SECONDS
  # its status is its program's, which a record needs beside the summary
  compute-sanitizer --tool "$tool" ${only[$tool]:-} python3 -m pytest -q -p no:cacheprovider ${cases[$tool]} \
    > "$logs/$tool.log" 2>&1 || echo "$?" > "$logs/$tool.status"
  echo $((SECONDS - begun)) > "$logs/$tool.seconds"
  echo "$tool: $((SECONDS - begun)) s" >&2
}
for tool in memcheck racecheck initcheck; do watch "$tool" & done
wait
python3 scripts/record_sanitizers.py "$logs" --out "$out"
