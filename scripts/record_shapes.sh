#!/usr/bin/env bash
# Measures generate() on one GPU for decoders of every structure, one prompt of 8,192 tokens in bfloat16, mixtures of experts
# with eight prompts too, and the 8B shape with weights of 4 bits and with adapters; checks fused layers; appends the records
# to benchmarks/results (or to folder $1). A model that fails stops no other.
# On an H100 expect 25 to 45 s a model, most of it kernels to compile: the nine that the first line has, 1 x 8,192,
# about 5 minutes; check_layers.py about 4.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
failed=0
generate() {
  python3 scripts/benchmark_generate.py --out "$out/generate.jsonl" --dtype bfloat16 --new-tokens 48 "$@" || failed=1
}

for model in gemma-3-4b glm-4-9b phi-4-14b qwen2.5-7b qwen2.5-vl-7b mistral-small-24b smollm3-3b qwen3.5-4b qwen3-4b; do
  generate --model "$model" --lengths 8192
done
generate --model olmo-2-7b --lengths 3968  # it has 4,096 positions
for model in qwen3-30b-a3b gpt-oss-20b mixtral-8x7b; do
  generate --model "$model" --lengths 8192
  generate --model "$model" --lengths 4096,4096,4096,4096,4096,4096,4096,4096
done
own="dynamic patched patched-no-fuse"  # transformers' and bitsandbytes' kernels, ours, and theirs in our graphs
four=4096,4096,4096,4096
eight=$four,$four
generate --model llama-3.1-8b --engines $own --weights nf4 --lengths 4096 16384 $four $eight
generate --model llama-3.1-8b --engines $own --lora 16 --lengths 8192 $eight
generate --model llama-3.1-8b --engines $own --weights nf4 --lora 16 --lengths 4096 $eight
python3 scripts/check_layers.py --out "$out/layers.jsonl" || failed=1
exit $failed
