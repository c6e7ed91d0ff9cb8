"""Tiny tasks of lm-eval, for the server's clients and for lm-eval's own Hugging Face model beside them."""

from __future__ import annotations

from typing import Any

CONTEXT = "the cat sat"
CHOICES = [" on a mat", " dogs", " while birds sing"]
STARTS = ["the cat", "dogs like", "birds sing far over", "quiet green hills"]


def _data(rows: list[dict[str, Any]]) -> Any:
    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return load


def choice() -> dict[str, Any]:
    """Multiple choice: log-likelihoods of answers."""
    rows = [{"start": start, "label": i % 3} for i, start in enumerate(STARTS)]
    return {
        "task": "tiny_choice", "custom_dataset": _data(rows), "test_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "{{start}}", "doc_to_choice": CHOICES, "doc_to_target": "{{label}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "num_fewshot": 0,
    }  # fmt: skip


def rolling() -> dict[str, Any]:
    """Log-likelihoods of whole texts."""
    rows = [{"text": f"{start} and {start}"} for start in STARTS]
    return {
        "task": "tiny_rolling", "custom_dataset": _data(rows), "test_split": "test", "doc_to_text": "",
        "output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "num_fewshot": 0,
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip


def generation() -> dict[str, Any]:
    """Greedy answers, with more strings that end them than OpenAI allows."""
    until = [" green", " hills", "zq", "zx", "zw", "zv"]
    return {
        "task": "tiny_generation", "custom_dataset": _data([{"start": start} for start in STARTS]),
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{start}}", "doc_to_target": "milk",
        "generation_kwargs": {"until": until, "max_gen_toks": 16, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}], "num_fewshot": 0,
    }  # fmt: skip


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """What the model said to each of a task's requests, in the documents' order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["resps"]]
