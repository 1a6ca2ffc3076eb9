"""lm-eval on a patched model, on a local task."""

from __future__ import annotations

import json

import pkv_hf
from tiny import assert_on_pages

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Norway": "Oslo", "Cuba": "Havana"}


def test_a_local_task(smollm2, smollm2_tokenizer, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = tmp_path / "capitals.jsonl"
    lines = [{"question": f"The capital of {land} is", "answer": city} for land, city in CAPITALS.items()]
    file.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "capitals.yaml").write_text(TASK.format(file=file))

    def evaluate():
        model = HFLM(pretrained=smollm2, tokenizer=smollm2_tokenizer, batch_size=3)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(model, tasks=["capitals"], task_manager=manager, bootstrap_iters=0)
        return found["results"]["capitals"]["exact_match,none"], [s["resps"] for s in found["samples"]["capitals"]]

    expected = evaluate()
    assert expected[0] > 0
    with pkv_hf.patched(smollm2):
        assert evaluate() == expected
        assert pkv_hf.report(smollm2).route == "sdpa"
        assert_on_pages(smollm2)
