#!/usr/bin/env bash
# Package: lm_eval[api] 0.4.13.
# Expected: a task with five stop strings (lm_eval's own humaneval has as many) ends its answers at each of the five, or
#   there is a warning. OpenAI's service takes at most four, but local-chat-completions is for servers of one's own.
# What happens: local-chat-completions sends the first four and drops the rest without a word, and does not cut the answer
#   itself either. The same task against the same server gets another score than with local-completions, which sends five.
set -euo pipefail
changed() {
    echo "Changed: local-chat-completions sends all five stop strings, says that it does not, or does not run this task any more."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check "lm_eval[api]==0.4.13" datasets==5.2.0 ||
    { echo "The packages could not be installed."; exit 2; }
cd "$folder"
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" TQDM_DISABLE=1
"$folder/venv/bin/python" - 2>log <<'PYTHON' || changed
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

STOPS = ["\n\n", "Question:", "Answer:", "#", ";"]
requests = []


class Answer(BaseHTTPRequestHandler):
    """A server whose model would say "4; that was easy", and that minds all stop strings it is sent."""

    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        text = "4; that was easy"
        for stop in requests[-1]["stop"]:
            text = text.split(stop)[0]
        message = {"role": "assistant", "content": text}
        body = {"choices": [{"index": 0, "text": text, "message": message, "finish_reason": "stop"}]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


Path("tasks").mkdir()
Path("questions.json").write_text(json.dumps([{"question": "2 + 2 =", "answer": "4"}]))
task = {
    "task": "sums", "dataset_path": "json", "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": str(Path("questions.json").resolve())}},
    "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": STOPS},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
Path("tasks/sums.yaml").write_text(json.dumps(task))
server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
seen = {}
for name, path in (("local-completions", "completions"), ("local-chat-completions", "chat/completions")):
    model = {"model": "m", "base_url": f"http://127.0.0.1:{server.server_port}/v1/{path}", "tokenizer_backend": "none"}
    result = lm_eval.simple_evaluate(model=name, model_args=model, tasks=["sums"], apply_chat_template="chat" in name,
                                     task_manager=TaskManager(include_path="tasks", include_defaults=False))
    seen[name] = requests[-1]["stop"], float(result["results"]["sums"]["exact_match,none"])
    print(f"{name}: stop sent {seen[name][0]}, exact match {seen[name][1]}")
# Another message says only that no end token is known.
said = [line.strip() for line in Path("log").read_text().splitlines() if "stop" in line.lower() and "EOS" not in line]
print("log about stop strings:", said)
sys.exit(bool(said) or seen != {"local-completions": (STOPS, 1.0), "local-chat-completions": (STOPS[:4], 0.0)})
PYTHON
