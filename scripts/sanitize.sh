#!/usr/bin/env bash
# Runs the kernels' tests under NVIDIA's compute-sanitizer: all of them by memcheck and racecheck, a few small cases of
# every kernel by initcheck. Appends a record to benchmarks/results/sanitizers.jsonl (or to file $1). Fails unless all
# three are clean.
# racecheck looks at shared memory only: races between programs are what the fuzzing of merged results would show.
# Other libraries' kernels run in those tests too. In attention's ours alone are watched, by their names: cuDNN's reads
# out of bounds. In the layers' all are: racecheck crashes in cuBLAS where it is left out. initcheck misses what cuBLAS
# writes, and then reports torch's kernels for reading it: it runs where there are none but ours.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/sanitizers.jsonl}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
attention="tests/kernels/test_kernels.py tests/kernels/test_append.py"
layers="tests/kernels/test_linear.py tests/kernels/test_linear4.py tests/kernels/test_adapters.py tests/experts/test_kernels.py tests/ahead/test_select.py"
small=tests/kernels/test_unwritten_memory.py
ours=(--kernel-name 'regex=^[a-z0-9_]+_kernel$')
out_of_bounds='
import torch
from pkv_hf.kernels.elementwise import act_kernel
x, width = torch.zeros(8, device="cuda"), 65536
act_kernel[(64, 1)](x, x, x, width, width, width, ACTIVATION="silu", GATED=True, BLOCK=1024, PDL=False)
torch.cuda.synchronize()'

command -v compute-sanitizer > /dev/null || {
  echo "sanitize: compute-sanitizer is not on the PATH: it comes with NVIDIA's CUDA toolkit" >&2
  exit 2
}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$logs/triton}
python3 -m pytest -q -n 8 $small $layers $attention  # compiles, which a sanitizer would make slow
export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor is an allocation of its own, so that its bounds are known
compute-sanitizer "${ours[@]}" python3 -c "$out_of_bounds" > "$logs/ours.log" 2>&1 || true
grep -q " at act_kernel" "$logs/ours.log" || {
  tail -n 5 "$logs/ours.log" >&2
  echo "sanitize: a kernel of ours that reads out of bounds was not reported: see how \$ours selects them" >&2
  exit 1
}
declare -A seconds=()
watch() { # TOOL TESTS [OPTION...]; a tool's later runs are added to its first
  local begun=$SECONDS
  echo "$1 $2 ..." >&2
  # its status is its program's, which a record needs beside the summary
  compute-sanitizer --tool "$1" "${@:3}" python3 -m pytest -q -p no:cacheprovider $2 >> "$logs/$1.log" 2>&1 \
    || echo "$?" > "$logs/$1.status"
  seconds[$1]=$((${seconds[$1]:-0} + SECONDS - begun))
  echo "${seconds[$1]}" > "$logs/$1.seconds"
}
for tool in memcheck racecheck; do
  watch "$tool" "$small $layers"
  watch "$tool" "$attention" "${ours[@]}"
done
watch initcheck "$small"
python3 scripts/record_sanitizers.py "$logs" --out "$out"
