#!/usr/bin/env bash
# Package: openai 3.54.0 (pydantic 2.14.4).
# Expected: what chat.completions.parse(response_format=MODEL) returns is a Pydantic object made by openai itself, so that
#   model_dump() writes it out without complaint.
# What happens: the dump is complete and right, but Pydantic warns that it expected `none` for the field "parsed", the very
#   field that parse() has just filled. It happens with every answer that could be parsed.
set -euo pipefail
changed() {
    echo "Changed: a parsed completion can be dumped without a warning, or no longer at all."
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
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
from pydantic import BaseModel


class Town(BaseModel):
    name: str
    people: int


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": '{"name": "Ulm", "people": 126000}'}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
messages = [{"role": "user", "content": "A town, please."}]
completion = client.chat.completions.parse(model="m", messages=messages, response_format=Town)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dump = completion.model_dump()
print("parsed:", repr(completion.choices[0].message.parsed))
print("dumped:", dump["choices"][0]["message"]["parsed"])
print("warnings:", [str(warning.message) for warning in caught])
right = dump["choices"][0]["message"]["parsed"] == {"name": "Ulm", "people": 126000}
sys.exit(not (right and any("field_name='parsed'" in str(warning.message) for warning in caught)))
PYTHON
