#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, and appends the records to benchmarks/results (or to folder $1).
# With a long text as $2 (60,000 tokens and more), perplexity beyond SmolLM2's 8,192 positions too.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
eight=8192,8192,8192,8192,8192,8192,8192,8192
ragged=16384,8192,4096,12000,2048,6000,1000,2904
generate() { python3 scripts/benchmark_generate.py --out "$out/generate.jsonl" "$@"; }

python3 -m pytest -q -n 12 tests/gpu tests/test_kernels.py tests/test_linear.py
python3 scripts/check_kernels.py --cases 50 --longest 131072 --jobs 12 --out "$out/kernels.jsonl"
generate --model smollm2 --dtype float32 --lengths 1024 7900 7000,900,3000,120 --new-tokens 48
generate --model llama-3.1-8b --dtype bfloat16 --lengths "$eight" "$ragged" 512 32768 100000 --new-tokens 48
generate --model llama-3.1-8b --dtype bfloat16 --lengths 8192 --new-tokens 48 \
  --engines dynamic-cold patched patched-no-fuse patched-no-run-ahead patched-no-graphs patched-pages-only
generate --model llama-3.2-1b --dtype bfloat16 --lengths 8192 --new-tokens 48 --engines static-compile patched
cache=$(mktemp -d)  # a first call with nothing compiled, and one in a process that finds it compiled
for _ in 1 2; do
  TRITON_CACHE_DIR=$cache generate --model llama-3.1-8b --dtype bfloat16 --lengths 8192 --new-tokens 48
done
python3 scripts/benchmark_linear.py --out "$out/linear.jsonl"
generate --model llama-3.1-8b --dtype bfloat16 --lengths 8192 32768 512 --new-tokens 48 --engines static-compile

perplexity() { python3 scripts/perplexity.py --device cuda --out "$out/perplexity.jsonl" "$@"; }
for dtype in float32 bfloat16; do
  for mode in "chunk --chunk 8" "chunk --chunk 512" "decode --decode-tokens 512"; do
    # shellcheck disable=SC2086
    perplexity --dtype "$dtype" --contexts 8192 --max-windows 4 --mode $mode
    if [ -n "${2:-}" ]; then
      perplexity --dtype "$dtype" --text-file "$2" --contexts 16384 --max-windows 2 --rope-scaling yarn:2 --mode $mode
      perplexity --dtype "$dtype" --text-file "$2" --contexts 32768 --max-windows 2 --rope-scaling yarn:4 --mode $mode
    fi
  done
  python3 scripts/passkey.py --device cuda --dtype "$dtype" --lengths 1024 2048 4096 8000 --out "$out/passkey.jsonl"
  python3 scripts/benchmark_dataset.py --device cuda --dtype "$dtype" --requests 64 --max-active 8 --new-tokens 128 \
    --out "$out/dataset.jsonl"
done
for mode in "chunk --chunk 8" "decode --decode-tokens 512"; do
  # shellcheck disable=SC2086
  perplexity --dtype bfloat16 --kv-dtype int8 --contexts 8192 --max-windows 4 --mode $mode
done
