"""Programs that know nothing of lolcats start on an exported directory: ``transformers serve`` and ``lm_eval``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model

import lolcats
from lolcats.config import AttentionConfig
from lolcats.modeling.merge import save_whole

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
PROMPT = "the cat sat on a mat and saw that dogs like warm milk"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    model = lolcats.convert(tiny_model("llama"), AttentionConfig(window_size=8, sinks=2, feature_dim=8))
    directory = tmp_path_factory.mktemp("exported") / "merged"
    save_whole(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def address(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running ``transformers serve``."""
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = "from transformers.cli.transformers import main; main()"
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", port]
    log = tmp_path_factory.mktemp("log") / "serve"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", program, "serve", str(exported), *options], env=ENVIRONMENT, stdout=out, stderr=out
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


@pytest.mark.slow
def test_transformers_serve(address: str, exported: Path, tokenizer) -> None:
    model, chat = str(exported), [{"role": "user", "content": PROMPT}]
    settings = {"model": model, "max_tokens": 25, "temperature": 0}
    answer = json.loads(post(f"{address}/v1/chat/completions", {**settings, "messages": chat}))
    assert answer["usage"]["completion_tokens"] <= 25
    text = answer["choices"][0]["message"]["content"]
    assert text == expected(exported, tokenizer, chat)
    streamed = post(f"{address}/v1/chat/completions", {**settings, "messages": chat, "stream": True}).decode()
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    assert len(pieces) > 3
    assert "".join(pieces).strip() == text.strip()


def expected(exported: Path, tokenizer, chat: list[dict[str, str]]) -> str:
    model = lolcats.load(exported)
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(inputs["input_ids"], max_new_tokens=25, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


TASKS = {
    "choose": """
        output_type: multiple_choice
        doc_to_text: "{{text}}"
        doc_to_choice: [" milk", " hills", " mat"]
        doc_to_target: 0
        metric_list: [{metric: acc}]
    """,
    "continue": """
        output_type: generate_until
        doc_to_text: "{{text}}"
        doc_to_target: " milk"
        generation_kwargs: {until: ["<eos>"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
    "perplexity": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}]
    """,
}


@pytest.mark.slow
def test_lm_eval(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    words = PROMPT.split()
    records = [{"text": " ".join(words[i:] + words[:i])} for i in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, text in TASKS.items():
        common = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'texts.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(common + files + "\n".join(line.strip() for line in text.splitlines()))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(TASKS), "--include_path", str(tmp_path),
        "--model_args", f"pretrained={exported},trust_remote_code=True", "--device", "cpu", "--batch_size", "4",
        "--output_path", str(tmp_path / "results"), "--log_samples",
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())
    assert set(results["results"]) == set(TASKS)
    assert all(results["n-samples"][name]["effective"] == 6 for name in TASKS)
    samples = [json.loads(line) for line in next((tmp_path / "results").rglob("samples_continue_*")).open()]
    assert all(s["filtered_resps"][0].strip() == continued(exported, s["doc"]["text"]) for s in samples)


def continued(exported: Path, text: str) -> str:
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(exported), lolcats.load(exported)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True).strip()
