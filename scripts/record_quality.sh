#!/usr/bin/env bash
# Records perplexity, passkeys and speed on real requests of SmolLM2 in bfloat16 on a GPU; appends to benchmarks/results
# (or to folder $1). $2: a long text (170,000 tokens are used), for contexts beyond the model's 8,192 positions too.
# $3: a CSV or JSON of real requests. Five minutes on an H100 whose host takes 25 ms for an unpatched forward.
#
# Rounding in bfloat16 moves a token's log-probability by 0.04, so that a mean is known to 0.05 % from 65,000 tokens on
# (three standard errors): chunk mode scores all of the text, decode mode what there is time for.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
text=()
[ -z "${2:-}" ] || text=(--text-file "$2")
perplexity() {
  python3 scripts/perplexity.py --device cuda --dtype bfloat16 --mode chunk decode --chunk 1024 "${text[@]}" \
    --out "$out/perplexity.jsonl" "$@"
}

perplexity --contexts 8192 --decode-tokens 32 --kv-dtype same int8 fp8
if [ -n "${2:-}" ]; then
  perplexity --contexts 16384 --decode-tokens 64 --kv-dtype same int8 --rope-scaling yarn:2
  perplexity --contexts 32768 --decode-tokens 64 --kv-dtype same int8 --rope-scaling yarn:4
fi
python3 scripts/passkey.py --device cuda --dtype bfloat16 --lengths 1024 4096 8000 --out "$out/passkey.jsonl"
requests=(--new-tokens 128)
[ -z "${3:-}" ] || requests=(--trace-file "$3")
python3 scripts/benchmark_dataset.py --device cuda --dtype bfloat16 --requests 48 --max-active 8 "${requests[@]}" \
  --out "$out/dataset.jsonl"
