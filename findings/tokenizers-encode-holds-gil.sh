#!/usr/bin/env bash
# Package: tokenizers 0.23.3, on CPython with the usual lock of the interpreter.
# Expected: the work is done in Rust, so that encode() and decode() of one long text leave Python's other threads running
#   as encode_batch() and decode_batch() of the same text do.
# What happens: encode() and decode() keep the lock of the interpreter: a thread that sleeps for 1 ms at a time gets no turn
#   until they are done. With encode_batch([text]) and decode_batch([ids]) it waits some milliseconds. So a server that
#   calls encode() in a thread, to keep its event loop free, stalls all the same.
set -euo pipefail
changed() {
    echo "Changed: encode() and decode() no longer stall other threads, or the batch methods do."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check tokenizers==0.23.3 ||
    { echo "The packages could not be installed."; exit 2; }
"$folder/venv/bin/python" - <<'PYTHON' || changed
import random
import string
import sys
import threading
import time

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

chance = random.Random(0)
words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 8))) for _ in range(3000)]
text = " ".join(chance.choices(words, k=200_000))
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator([" ".join(words)], trainers.BpeTrainer(vocab_size=4000, show_progress=False))
ids = tokenizer.encode_batch([text])[0].ids


def measured(call):
    """Seconds that ``call`` takes, and the longest wait of another thread meanwhile."""
    waits, done = [], threading.Event()

    def sleeper():
        while not done.is_set():
            begin = time.perf_counter()
            time.sleep(0.001)
            waits.append(time.perf_counter() - begin)

    thread = threading.Thread(target=sleeper)
    thread.start()
    time.sleep(0.05)
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    done.set()
    thread.join()
    return seconds, max(waits)


calls = {
    "encode(text)": lambda: tokenizer.encode(text),
    "encode_batch([text])": lambda: tokenizer.encode_batch([text]),
    "decode(ids)": lambda: tokenizer.decode(ids),
    "decode_batch([ids])": lambda: tokenizer.decode_batch([ids]),
}
shares = {}
for name, call in calls.items():
    seconds, wait = min((measured(call) for _ in range(3)), key=lambda pair: pair[1] / pair[0])
    shares[name] = wait / seconds
    print(f"{name}: {seconds:.3f} s, another thread waited for up to {wait:.3f} s")
stalls = [shares[name] > 0.8 for name in calls]
sys.exit(stalls != [True, False, True, False])
PYTHON
