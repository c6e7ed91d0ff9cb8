#!/usr/bin/env bash
# Package: lm_eval[api] 0.4.13.
# Expected: num_concurrent only says how many requests are under way at once; what each request asks for stays the same.
# What happens: local-completions sends the task's stop strings plus eos_string with num_concurrent=1, but only the task's
#   with num_concurrent=2, even where eos_string is given in the model's arguments. (Without that argument, the text of the
#   tokenizer's end token comes and goes in the same way.) Nothing is logged, and the answers to score can differ.
set -euo pipefail
changed() {
    echo "Changed: lm_eval sends eos_string whatever num_concurrent is, or does not run this task any more."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check "lm_eval[api]==0.4.13" datasets==5.2.0 ||
    { echo "The packages could not be installed."; exit 2; }
cd "$folder"
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" TQDM_DISABLE=1
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' || changed
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

requests = []


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = {"choices": [{"index": 0, "text": "4", "finish_reason": "stop"}]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


Path("tasks").mkdir()
questions = [{"question": "2 + 2 =", "answer": "4"}, {"question": "1 + 3 =", "answer": "4"}]
Path("questions.json").write_text(json.dumps(questions))
task = {
    "task": "sums", "dataset_path": "json", "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": str(Path("questions.json").resolve())}},
    "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
Path("tasks/sums.yaml").write_text(json.dumps(task))
server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
stops = {}
for concurrent in (1, 2):
    requests.clear()
    model = {"model": "m", "base_url": f"http://127.0.0.1:{server.server_port}/v1/completions", "tokenizer_backend": "none",
             "eos_string": "</s>", "num_concurrent": concurrent}
    lm_eval.simple_evaluate(model="local-completions", model_args=model, tasks=["sums"],
                            task_manager=TaskManager(include_path="tasks", include_defaults=False))
    stops[concurrent] = [request["stop"] for request in requests]
    print(f"num_concurrent={concurrent}: stop of the two requests:", stops[concurrent])
sys.exit(stops != {1: [["\n\n", "</s>"]] * 2, 2: [["\n\n"]] * 2})
PYTHON
