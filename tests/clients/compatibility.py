"""The table of docs/compatibility.md, made from the tests that passed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import distributions, version

from packaging.version import Version
from support.programs import ROUTERS

DISTRIBUTIONS = {
    "openai": "openai",
    "LangChain ChatOpenAI": "langchain-openai",
    "LangChain OpenAI": "langchain-openai",
    "LiteLLM openai/": "litellm",
    "LiteLLM hosted_vllm/": "litellm",
    "LiteLLM text-completion-openai/": "litellm",
    "LlamaIndex OpenAILike": "llama-index-llms-openai-like",
    "lm-eval local-completions": "lm-eval",
    "lm-eval local-chat-completions": "lm-eval",
    "vllm-router round_robin": "vllm-router",
    "vllm-router cache_aware": "vllm-router",
    "litellm[proxy] openai/": "litellm",
    "litellm[proxy] hosted_vllm/": "litellm",
}
BLOCK = re.compile(r"(<!-- clients -->\n).*?(<!-- /clients -->)", re.S)

APART = ("vllm-router", "litellm[proxy]")
"""Clients that are programs of an environment of their own: LiteLLM's proxy wants older packages than the others."""

Row = tuple[str, str, str]
"""Client, its version, what works."""


def row(client: str, feature: str) -> Row:
    name = DISTRIBUTIONS[client]
    return client, router_version(name) if client.startswith(APART) else version(name), feature


def router_version(name: str) -> str:
    """The version of a distribution in the routers' environment; "" if it is not there."""
    places = [str(path) for path in ROUTERS.glob("lib/python*/site-packages")]
    return next((found.version for found in distributions(name=name, path=places)), "")


def table(rows: Iterable[Row]) -> str:
    works: dict[tuple[str, str], list[str]] = {}
    for client, number, feature in rows:
        features = works.setdefault((client, number), [])
        if feature not in features:
            features.append(feature)
    order = list(DISTRIBUTIONS)
    lines = ["| client | version | what works |", "|---|---|---|"]
    for client, number in sorted(works, key=lambda key: (order.index(key[0]), Version(key[1]))):
        lines.append(f"| {_named(client)} | {number} | {'; '.join(works[client, number])} |")
    return "\n".join(lines) + "\n"


def page(text: str, rows: Iterable[Row]) -> str:
    """The page with its table renewed; nothing else changes."""
    if not BLOCK.search(text):
        raise ValueError("the page has no block between <!-- clients --> and <!-- /clients -->")
    return BLOCK.sub(lambda match: f"{match[1]}{table(rows)}{match[2]}", text)


def _named(client: str) -> str:
    """``LangChain ChatOpenAI`` as LangChain `ChatOpenAI`."""
    package, _, kind = client.partition(" ")
    return f"{package} `{kind}`" if kind else f"`{package}`"
