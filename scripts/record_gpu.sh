#!/usr/bin/env bash
# Checks everything that needs a GPU and measures generate() on it; appends the records to benchmarks/results (or to
# folder $1). record_quality.sh and record_policy.sh record the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
eight=8192,8192,8192,8192,8192,8192,8192,8192
ragged=16384,8192,4096,12000,2048,6000,1000,2904
generate() { python3 scripts/benchmark_generate.py --out "$out/generate.jsonl" "$@"; }

python3 scripts/record_tests.py tests/gpu tests/kernels/test_kernels.py tests/kernels/test_append.py \
  tests/kernels/test_linear.py --jobs 12 --out "$out/tests.jsonl"
python3 scripts/record_families.py --out "$out/families.jsonl"
python3 scripts/check_kernels.py --cases 50 --longest 131072 --jobs 12 --out "$out/kernels.jsonl"
generate --model smollm2 --dtype float32 --lengths 1024 7900 7000,900,3000,120 --new-tokens 48
generate --model llama-3.1-8b --dtype bfloat16 --lengths "$eight" "$ragged" 512 8192 32768 100000 --new-tokens 48 \
  --engines static-compile patched
generate --model llama-3.1-8b --dtype bfloat16 --lengths 8192 --new-tokens 48 \
  --engines dynamic-cold patched patched-no-fuse patched-no-run-ahead patched-no-graphs patched-pages-only
generate --model llama-3.2-1b --dtype bfloat16 --lengths 8192 --new-tokens 48 --engines static-compile patched
generate --model llama-3.1-8b --dtype bfloat16 --lengths 16384 --new-tokens 48 --mode beams --num-beams 4
generate --model llama-3.1-8b --dtype bfloat16 --lengths 16384 --new-tokens 48 --mode assisted --assistant llama-3.2-1b
cache=$(mktemp -d)  # a first call with nothing compiled, and one in a process that finds it compiled
for _ in 1 2; do
  TRITON_CACHE_DIR=$cache generate --model llama-3.1-8b --dtype bfloat16 --lengths 8192 --new-tokens 48
done
scripts/record_shapes.sh "$out"
python3 scripts/benchmark_prefix.py --document 8192 --rope-scaling yarn:2 --out "$out/prefix.jsonl"
python3 scripts/benchmark_linear.py --out "$out/linear.jsonl"
python3 scripts/benchmark_experts.py --out "$out/experts.jsonl"
for weights in "" "--weights nf4"; do
  python3 scripts/finetune_then_serve.py --steps 60 --batch 8 --block 512 --new-tokens 64 --out "$out/finetune.jsonl" $weights
done
[ "$(nvidia-smi --list-gpus | wc -l)" -lt 2 ] || python3 scripts/benchmark_devices.py --out "$out/devices.jsonl"
