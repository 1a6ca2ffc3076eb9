#!/usr/bin/env bash
# Calibrates this GPU, then checks and measures the policy and the attention routes on it; appends the records to
# benchmarks/results (or to folder $1). $2: a CSV or JSON of real requests, if there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
traces() { python3 scripts/benchmark_traces.py --out "$out/traces.jsonl" "$@"; }
attention() { python3 scripts/benchmark_attention.py --out "$out/attention.jsonl" "$@"; }

pkv-hf calibrate
traces
traces --layers 32 --steps 4 --samples 3
[ -z "${2:-}" ] || traces --trace-file "$2" --requests 400 --steps 24
traces --cases bimodal:8 --seeds 20260623 --kv-heads 32 --group 1
traces --cases bimodal:8 --seeds 20260623 --kv-heads 4 --group 8
attention --rows 1 --length 8192 16384 32768 65536
attention --rows 4 8 16 --length 8192 16384 32768
attention --rows 64 --length 2048 8192
attention --rows 8 --length 16384 --query-heads 32 --group 1 2 8 16
attention --rows 8 --length 16384 --query-heads 42 --group 3 6 7
attention --rows 1 8 --length 16384 --page-size 32 64 128 --holes 0 0.5
attention --rows 1 8 --length 8192 8240 --order scattered consecutive
attention --rows 1 8 --length 16384 --head-dim 64 256
attention --rows 1 8 --length 16384 --dtype bfloat16 float32
attention --rows 8 --length 16384 --dtype bfloat16 --kv-dtype same int8 fp8 --engines split workqueue
attention --rows 1 8 --length 16384 --engines split --splits 1 2 4 8 16 32 64
