#!/usr/bin/env bash
# Package: uvicorn 0.54.0 with the event loop of CPython's asyncio (seen with 3.11), on Linux.
# Expected: asyncio's documentation says that TCP_NODELAY is set by default, so that an answer on a kept-alive connection
#   takes well under a millisecond here, wherever the listening socket comes from.
# What happens: with a socket of socket.create_server(), or of uvicorn's own Config.bind_socket(), each answer after the
#   first takes about 40 ms. Both sockets have proto 0, which their connections inherit, and asyncio sets TCP_NODELAY only
#   where proto is IPPROTO_TCP. The body, sent after the header, then waits until the client acknowledges the header. With
#   socket.socket(AF_INET, SOCK_STREAM, IPPROTO_TCP) there is no wait.
set -euo pipefail
changed() {
    echo "Changed: all three sockets are equally fast, or equally slow."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check uvicorn==0.54.0 h11==0.16.0 ||
    { echo "The packages could not be installed."; exit 2; }
"$folder/venv/bin/python" - <<'PYTHON' || changed
import http.client
import socket
import statistics
import sys
import threading
import time

import uvicorn


async def hello(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": b"Hello."})


def with_protocol():
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    return listener


def milliseconds(listener):
    """Median time of an answer on one kept-alive connection, the first left out."""
    server = uvicorn.Server(uvicorn.Config(hello, loop="asyncio", http="h11", lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    connection = http.client.HTTPConnection(*listener.getsockname())
    times = []
    for _ in range(41):
        begin = time.perf_counter()
        connection.request("GET", "/")
        connection.getresponse().read()
        times.append(1000 * (time.perf_counter() - begin))
    connection.close()
    server.should_exit = True
    thread.join()
    return statistics.median(times[1:])


listeners = {
    "socket.create_server()": socket.create_server(("127.0.0.1", 0)),
    "uvicorn.Config.bind_socket()": uvicorn.Config(hello, port=0, log_level="critical").bind_socket(),
    "socket.socket(..., IPPROTO_TCP)": with_protocol(),
}
medians = {}
for name, listener in listeners.items():
    proto = listener.proto
    medians[name] = milliseconds(listener)
    print(f"{name}: proto {proto}, {medians[name]:.1f} ms for an answer")
slow, also_slow, fast = medians.values()
sys.exit(not (min(slow, also_slow) > 25 and fast < 15))
PYTHON
