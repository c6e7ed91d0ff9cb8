#!/usr/bin/env bash
# Package: openai 3.54.0 (pydantic 2.14.4).
# Expected: max_tokens cuts a plain answer short. That is no error with create(), nor for who iterates over stream(), so
#   stream.get_final_completion() should return the same text with finish_reason "length". Nothing is to be parsed: the
#   request has no response_format and no tools.
# What happens: get_final_completion() raises LengthFinishReasonError, "Could not parse response content", although all
#   events of the same stream came without an error and its snapshot is complete.
set -euo pipefail
changed() {
    echo "Changed: get_final_completion() no longer raises for a plain answer that max_tokens cuts."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check openai==3.54.0 pydantic==2.14.4 ||
    { echo "The packages could not be installed."; exit 2; }
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
"$folder/venv/bin/python" - <<'PYTHON' || changed
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

BASE = {"id": "1", "created": 1, "model": "m"}
PIECES = [
    {"delta": {"role": "assistant", "content": "One two"}, "finish_reason": None},
    {"delta": {"content": " three"}, "finish_reason": None},
    {"delta": {}, "finish_reason": "length"},
]
WHOLE = {"message": {"role": "assistant", "content": "One two three"}, "finish_reason": "length"}


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request.get("stream"):
            chunks = [{**BASE, "object": "chat.completion.chunk", "choices": [{"index": 0, **piece}]} for piece in PIECES]
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            kind = "text/event-stream"
        else:
            body = json.dumps({**BASE, "object": "chat.completion", "choices": [{"index": 0, **WHOLE}]})
            kind = "application/json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
request = {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "Count."}]}

whole = client.chat.completions.create(**request).choices[0]
print("create():", repr(whole.message.content), whole.finish_reason)
with client.chat.completions.stream(**request) as stream:
    text = "".join(event.delta for event in stream if event.type == "content.delta")
    snapshot = stream.current_completion_snapshot.choices[0]
    print("stream(), iterated:", repr(text), snapshot.finish_reason)
    try:
        stream.get_final_completion()
        error = None
    except openai.LengthFinishReasonError as caught:
        error = caught
    print("get_final_completion():", repr(error))
same = whole.message.content == text == "One two three" and whole.finish_reason == snapshot.finish_reason == "length"
sys.exit(not (same and error is not None))
PYTHON
