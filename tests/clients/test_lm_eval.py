"""lm-eval's ``local-completions`` and ``local-chat-completions``; values beside those of its Hugging Face model."""

from __future__ import annotations

import json
from typing import Any

import lm_eval
import pytest
import tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from plain import Server

COMPLETIONS, CHAT = "lm-eval local-completions", "lm-eval local-chat-completions"
WAYS = [
    {"tokenized_requests": True}, {"tokenized_requests": False}, {"tokenized_requests": True, "batch_size": 4},
    {"tokenized_requests": False, "num_concurrent": 2},
]  # fmt: skip


def arguments(server: Server, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "base_url": f"{server.url}/completions", "tokenizer": str(server.directory),
        "tokenizer_backend": "huggingface", "max_retries": 1, **more,
    }  # fmt: skip


def evaluate(kind: str, args: dict[str, Any], spec: dict[str, Any], **more: Any) -> dict[str, Any]:
    batch_size = args.pop("batch_size", 1)
    results = lm_eval.simple_evaluate(
        kind, model_args=args, tasks=[spec], batch_size=batch_size, bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_defaults=False), **more,
    )  # fmt: skip
    assert results is not None
    return dict(results)


@pytest.mark.works(COMPLETIONS, "`loglikelihood` and `multiple_choice` tasks, the values of `--model hf`")
@pytest.mark.parametrize("way", WAYS, ids=json.dumps)
def test_multiple_choice(server: Server, reference: dict[str, Any], way: dict[str, Any]) -> None:
    results = evaluate("local-completions", arguments(server, **way), tasks.choice())
    found, expected = tasks.answers(results, "tiny_choice"), reference["tiny_choice"]
    assert len(found) == len(expected) == len(tasks.STARTS) * len(tasks.CHOICES)
    for [(value, greedy)], [(known, known_greedy)] in zip(found, expected, strict=True):
        assert value == pytest.approx(known, abs=1e-3)
        assert greedy == known_greedy
    for metric in ("acc,none", "acc_norm,none"):
        assert results["results"]["tiny_choice"][metric] == reference["metrics"]["tiny_choice"][metric]


@pytest.mark.works(COMPLETIONS, "`loglikelihood_rolling` tasks")
def test_rolling(server: Server, reference: dict[str, Any]) -> None:
    results = evaluate("local-completions", arguments(server, tokenized_requests=True), tasks.rolling())
    found, expected = tasks.answers(results, "tiny_rolling"), reference["tiny_rolling"]
    assert [value for [value] in found] == pytest.approx([value for [value] in expected], abs=1e-3)


@pytest.mark.works(COMPLETIONS, "whether a continuation is the greedy one")
def test_greedy_continuations(server: Server, reference: dict[str, Any]) -> None:
    """lm-eval compares a token's value with the largest of those that the reply names by their texts, and several
    tokens of a tokenizer of bytes have the same text."""
    model: Any = get_model("local-completions")(**arguments(server))
    context, greedy = reference["context"], reference["greedy"]
    other = [*greedy[:-1], (greedy[-1] + 1) % 300]
    requests = [(("", str(i)), context, continuation) for i, continuation in enumerate((greedy, other))]
    (value, is_greedy), (_, other_is_greedy) = model._loglikelihood_tokens(requests)
    assert value == pytest.approx(reference["greedy_likelihood"][0], abs=1e-3)
    assert reference["greedy_likelihood"][1] is True
    assert is_greedy
    assert not other_is_greedy


@pytest.mark.works(COMPLETIONS, "`loglikelihood` and `multiple_choice` tasks, the values of `--model hf`")
def test_the_end_token_has_an_entry(server: Server, reference: dict[str, Any]) -> None:
    """lm-eval asks for one token and drops the last entry: were there none for an end, it would drop the prompt's."""
    context = reference["context"]
    body = {"prompt": context, "echo": True, "logprobs": 1, "logit_bias": {"2": 100}}
    choice = server.complete(**body, max_tokens=1)
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == len(context) + 1
    assert len(choice["logprobs"]["top_logprobs"]) == len(context) + 1


@pytest.mark.works(COMPLETIONS, "`generate_until` tasks")
@pytest.mark.parametrize("way", WAYS, ids=json.dumps)
def test_generation(server: Server, reference: dict[str, Any], way: dict[str, Any]) -> None:
    until = tasks.generation()["generation_kwargs"]["until"]
    results = evaluate("local-completions", arguments(server, **way), tasks.generation())
    expected = [server.complete(start, max_tokens=16, stop=until)["text"] for start in tasks.STARTS]
    assert [text for [text] in tasks.answers(results, "tiny_generation")] == expected
    assert [text for [text] in reference["tiny_generation"]] == expected


@pytest.mark.works(CHAT, "`generate_until` tasks")
@pytest.mark.parametrize("way", [{}, {"num_concurrent": 2}], ids=json.dumps)
def test_chat(server: Server, way: dict[str, Any]) -> None:
    """Of more than four strings that end an answer it sends the first four."""
    until = tasks.generation()["generation_kwargs"]["until"]
    url = f"{server.url}/chat/completions"
    args = {"model": "tiny", "base_url": url, "max_retries": 1, **way}
    results = evaluate("local-chat-completions", args, tasks.generation(), apply_chat_template=True)
    expected = [
        server.said([{"role": "user", "content": start}], max_tokens=16, stop=until[:4]) for start in tasks.STARTS
    ]
    assert [text for [text] in tasks.answers(results, "tiny_generation")] == expected


@pytest.mark.works(CHAT, "`generate_until` tasks")
def test_chat_without_stops(server: Server) -> None:
    """It sends an empty list then."""
    model: Any = get_model("local-chat-completions")(
        model="tiny", base_url=f"{server.url}/chat/completions", max_retries=1
    )
    context = model.apply_chat_template([{"role": "user", "content": "the cat"}])
    texts = model.generate_until([Instance("generate_until", {}, (context, {"max_gen_toks": 8}), 0)])
    assert texts == [server.said([{"role": "user", "content": "the cat"}], max_tokens=8)]
