#!/usr/bin/env bash
# Package: litellm 1.108.7 (openai 3.57.0).
# Expected: completion(model="openai/NAME", user="someone") sends `user` to the server at api_base, or raises
#   UnsupportedParamsError: litellm's documentation says that a parameter which the model does not support is an error
#   unless drop_params is set.
# What happens: for a NAME that litellm does not know (every model that one serves oneself), and with the prefix
#   hosted_vllm/ too, `user` is left out without a word. It is sent if NAME happens to be one of OpenAI's. Another optional
#   field, `seed`, is always sent, and `verbosity` raises UnsupportedParamsError as documented.
set -euo pipefail
changed() {
    echo "Changed: litellm no longer drops user silently for models that it does not know."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check litellm==1.108.7 openai==3.57.0 ||
    { echo "The packages could not be installed."; exit 2; }
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 LITELLM_LOCAL_MODEL_COST_MAP=True
"$folder/venv/bin/python" - <<'PYTHON' || changed
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import litellm

requests = []


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        choice = {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


def fate(model, **field):
    """What becomes of an optional field of a request to ``model``."""
    requests.clear()
    messages = [{"role": "user", "content": "Hello."}]
    try:
        litellm.completion(model=model, messages=messages, api_base=base, api_key="none", **field)
    except litellm.UnsupportedParamsError:
        return "error"
    return "sent" if requests[0].items() >= field.items() else "dropped"


litellm.suppress_debug_info = True
server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_port}/v1"
fields = {"user": "someone", "seed": 1, "verbosity": "low"}
models = ("openai/my-model", "hosted_vllm/my-model", "openai/gpt-4o")
fates = {model: {name: fate(model, **{name: value}) for name, value in fields.items()} for model in models}
for model in models:
    print(model, fates[model])
unknown = {"user": "dropped", "seed": "sent", "verbosity": "error"}
as_described = fates["openai/my-model"] == fates["hosted_vllm/my-model"] == unknown
sys.exit(not (as_described and fates["openai/gpt-4o"]["user"] == "sent"))
PYTHON
