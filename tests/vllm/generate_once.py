"""Greedy outputs of vLLM in processes of its own, as JSON in OUT: generate_once.py MODEL OPTIONS OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conftest import engine, generate, references, tokens

if __name__ == "__main__":  # vLLM's processes import this file
    with engine(Path(sys.argv[1]), **json.loads(sys.argv[2])) as llm:
        Path(sys.argv[3]).write_text(json.dumps(tokens(generate(llm, references(Path(sys.argv[1]))))))
