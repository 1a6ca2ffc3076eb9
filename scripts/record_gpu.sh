#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, and appends the records to benchmarks/results (or to folder $1).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python3 -m pytest -q -n 12 tests/gpu tests/test_kernels.py
python3 scripts/check_kernels.py --cases 50 --longest 131072 --jobs 12 --out "$out/kernels.jsonl"
python3 scripts/benchmark_generate.py --model smollm2 --dtype float32 --lengths 1024 4096 7900 1024,1024,1024,1024 \
  7000,900,3000,120 --out "$out/generate.jsonl"
python3 scripts/benchmark_generate.py --model llama-3.1-8b --dtype bfloat16 --lengths 1024 8192 32768 \
  8192,8192,8192,8192,8192,8192,8192,8192 --engines static-compile patched --out "$out/generate.jsonl"
