"""What lm-eval's ``--model hf`` says about the model in DIR, as JSON on the last line: run by the project's Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lm_eval
import tasks
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lolcats  # noqa: F401  (registers the model type)


def main(directory: str) -> dict[str, Any]:
    torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
    model = HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=1)
    specs = [tasks.choice(), tasks.rolling(), tasks.generation()]
    results = lm_eval.simple_evaluate(
        model, tasks=specs, bootstrap_iters=0, log_samples=True, task_manager=TaskManager(include_defaults=False)
    )
    context = model.tokenizer(tasks.CONTEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        greedy = model.model.generate(context, max_new_tokens=24, do_sample=False)[0, context.shape[1] :].tolist()
    (likelihood,) = model._loglikelihood_tokens([(("", ""), context[0].tolist(), greedy)], disable_tqdm=True)
    return {
        **{spec["task"]: tasks.answers(results, spec["task"]) for spec in specs},
        "metrics": {task: results["results"][task] for task in results["results"]},
        "context": context[0].tolist(), "greedy": greedy, "greedy_likelihood": likelihood,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1]), default=str))
