"""Greedy outputs of vLLM in processes of its own, as JSON: generate_once.py MODEL OPTIONS"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conftest import engine, generate, references, tokens

if __name__ == "__main__":  # vLLM's processes import this file
    with engine(Path(sys.argv[1]), **json.loads(sys.argv[2])) as llm:
        print(json.dumps(tokens(generate(llm, references(Path(sys.argv[1]))))))
