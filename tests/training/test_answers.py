"""Loss on completions only: which tokens these are, through packing, the cache and both losses of stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, interrupt_at, sentence, tiny_model
from test_conversations import with_template
from test_distillation import naive
from torch import Tensor

import lolcats
from lolcats import pipeline
from lolcats.config import DataConfig, load_config
from lolcats.data import store
from lolcats.data.answers import hide_prompts
from lolcats.data.rows import Data, PackedRows, load_data, load_rows
from lolcats.errors import Interrupted, LolcatsError
from lolcats.report.table import loss_of
from lolcats.stages.finetune.distillation import Distillation
from lolcats.stages.finetune.stage import finetune
from lolcats.tensors import read_tensors

SPLITS = {"validation_rows": 2, "test_rows": 2}
# As Qwen3's: thoughts of earlier answers are dropped.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}think {{ m['content'] }}"
    "{% else %}{{ m['content'] }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BACKWARDS = "{% for m in messages|reverse %}{{ m['content'] }}<eos>{% endfor %}"


def written(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chats(number: int) -> list[dict[str, Any]]:
    """Conversations of two turns in which users speak of dogs and assistants of birds and cats."""
    talk = [("system", "the mat"), ("user", "dogs dogs {}"), ("assistant", "birds sing"), ("user", "dogs"),
            ("assistant", "the cat sat on a mat")]  # fmt: skip
    return [
        {"messages": [{"role": role, "content": text.format("and " * (1 + i % 7))} for role, text in talk]}
        for i in range(number)
    ]


def answers_of(tokenizer: Any, ids: Tensor, labels: Tensor) -> list[str]:
    """The runs of predicted tokens of a row as text."""
    found, run = [], list[int]()
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label >= 0:
            assert label == token
            run.append(token)
        elif run:
            found, run = [*found, tokenizer.decode(run)], []
    return [*found, tokenizer.decode(run)] if run else found


def document(tokenizer: Any, record: dict[str, Any], tmp_path: Path, **config: Any) -> tuple[Tensor, Tensor]:
    """Token ids and labels of a source of this one record."""
    own = store.open_source(
        written(tmp_path / "one.jsonl", [record]), tokenizer, DataConfig(loss="completion", **config)
    )
    raw = torch.from_numpy(own.read(0, int(own.lengths.sum())).copy()).long()
    return torch.where(raw < 0, ~raw, raw), raw.clamp_min(-1)


@pytest.mark.parametrize(("template", "answers"), [
    (CHAT_TEMPLATE, ["birds sing<eos>", "the cat sat on a mat<eos>"]),
    (THINKING, ["think the cat sat on a mat<eos>"]),
])  # fmt: skip
def test_answers_of_a_conversation(template: str, answers: list[str], tokenizer, tmp_path: Path) -> None:
    own = with_template(tokenizer, template)
    ids, labels = document(own, chats(1)[0], tmp_path)
    plain = own.apply_chat_template(chats(1)[0]["messages"], tokenize=False)
    assert ids.tolist() == own(plain, add_special_tokens=False).input_ids
    assert [text.replace(" ", "") for text in answers_of(own, ids, labels)] == [a.replace(" ", "") for a in answers]


@pytest.mark.parametrize("extra", ["", "a warm hill"])
def test_the_output_of_an_instruction(extra: str, tokenizer, tmp_path: Path) -> None:
    """With the end token, which must be learned, too."""
    record = {"instruction": "dogs like", "input": extra, "output": "green milk"}
    ids, labels = document(tokenizer, record, tmp_path)
    assert ids[-1] == tokenizer.eos_token_id
    (answer,) = answers_of(tokenizer, ids, labels)
    assert answer.replace(" ", "") == "greenmilk<eos>"


def test_a_completion_after_its_prompt(tokenizer, tmp_path: Path) -> None:
    ids, labels = document(tokenizer, {"prompt": "dogs like", "completion": " green milk"}, tmp_path)
    (answer,) = answers_of(tokenizer, ids, labels)
    assert answer.replace(" ", "") == "greenmilk<eos>"


def test_tokens_over_the_border_and_without_characters() -> None:
    offsets = [(0, 0), (0, 3), (3, 6), (6, 8), (8, 8), (8, 9), (9, 9)]
    assert hide_prompts(range(1, 8), offsets, [(4, 8)]) == [~1, ~2, 3, 4, 5, ~6, ~7]
    assert hide_prompts([], [], [(0, 1)]) == []


def test_what_has_no_prompts_is_refused(tokenizer, tmp_path: Path) -> None:
    config = DataConfig(sequence_length=16, loss="completion", **SPLITS)
    text = written(tmp_path / "text.jsonl", [{"text": "the cat sat"}] * 3)
    with pytest.raises(LolcatsError, match=r"data.loss=completion needs prompts, but .* is read as plain text"):
        load_data(text, tokenizer, config)
    strange = written(tmp_path / "strange.jsonl", chats(3))
    with pytest.raises(LolcatsError, match=r"record 1 .* does not show where its answers begin"):
        load_data(strange, with_template(tokenizer, BACKWARDS), config)
    users = [{"messages": [{"role": "user", "content": f"dogs {'and ' * i}"}]} for i in range(40)]
    with pytest.raises(LolcatsError, match="every record is empty"):
        load_data(written(tmp_path / "users.jsonl", users), tokenizer, config)
    with pytest.raises(LolcatsError, match="loss: expected one of all, completion"):
        load_config("paper-sinks", ["data.loss=answers"])


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_keep_their_labels(reset: bool, cached: bool, tokenizer, tmp_path: Path, monkeypatch) -> None:
    """In memory and read from the cache, with the ids of data that is read without them."""
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    if cached:
        monkeypatch.setattr(store, "LARGE", 1)
    many = [{**chat, "messages": [*chat["messages"], {"role": "user", "content": f"{'milk ' * (i % 40)}"}]}
            for i, chat in enumerate(chats(60))]  # fmt: skip
    source = written(tmp_path / "chats.jsonl", many)
    config = DataConfig(sequence_length=32, reset_at_documents=reset, **SPLITS)
    plain = load_data(source, tokenizer, config)
    data = load_data(source, tokenizer, DataConfig(**{**vars(config), "loss": "completion"}))
    again = load_data(source, tokenizer, DataConfig(**{**vars(config), "loss": "completion"}))
    assert data.fingerprint == again.fingerprint != plain.fingerprint
    assert isinstance(data.train, PackedRows) == cached
    assert not plain.labels
    seen = []
    for split in ("train", "validation", "test"):
        items, others = data.dataset(split), plain.dataset(split)
        assert len(items) == len(others) > 0
        for i in range(len(items)):
            item, other = items[i], others[i]
            assert torch.equal(item["input_ids"], other["input_ids"])
            assert torch.equal(other["labels"], other["input_ids"])
            if reset:
                assert torch.equal(item["position_ids"], other["position_ids"])
                assert (item["labels"][item["position_ids"] == 0] == -100).all()
            seen += answers_of(tokenizer, item["input_ids"], item["labels"])
    whole = [text.replace(" ", "") for text in seen]
    assert {"birdssing<eos>", "thecatsatonamat<eos>"} <= set(whole)
    assert not any("dogs" in text or "milk" in text for text in whole)
    kept = data.select(torch.tensor([1, 0]))
    assert torch.equal(kept.dataset("train")[1]["labels"], data.dataset("train")[0]["labels"])
    assert torch.equal(load_rows(source, tokenizer, config)[0], load_rows(
        source, tokenizer, DataConfig(**{**vars(config), "loss": "completion"}))[0])  # fmt: skip


def test_a_mixture_of_texts_and_answers(tokenizer, tmp_path: Path) -> None:
    """Each source says which of its tokens count."""
    import random

    rng = random.Random(0)
    texts = [{"text": "far " + sentence(rng, 20)} for _ in range(40)]
    written(tmp_path / "texts.jsonl", texts)
    written(tmp_path / "chats.jsonl", chats(60))
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text("sources:\n- {path: texts.jsonl}\n- {path: chats.jsonl, loss: completion}\n")
    data = load_data(str(mixed), tokenizer, DataConfig(sequence_length=32, **SPLITS))
    items = data.dataset("train")
    hidden = [tokenizer.decode(x["input_ids"][x["labels"] < 0]) for x in (items[i] for i in range(len(items)))]
    shown = [tokenizer.decode(x["input_ids"][x["labels"] >= 0]) for x in (items[i] for i in range(len(items)))]
    assert any("dogs" in text for text in hidden)
    assert not any("far" in text or "birds" in text for text in hidden)
    assert any("far" in text for text in shown)
    assert (load_rows(str(mixed), tokenizer, DataConfig(sequence_length=32))[0] >= 0).all()
    with pytest.raises(LolcatsError, match=r"texts.jsonl is read as plain text"):
        load_data(str(mixed), tokenizer, DataConfig(sequence_length=32, loss="completion", **SPLITS))


def data(positions: bool = False) -> Data:
    """Rows of which only few tokens are to be predicted, in some none at all."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 300, (40, 32), generator=generator)
    shares = torch.tensor([0.0, 0.1, 0.5, 0.9])[torch.arange(40) % 4]
    labels = ids.where(torch.rand(ids.shape, generator=generator) < shares[:, None], -100)
    places = torch.arange(32) % (9 + torch.arange(40)[:, None] % 14)
    if positions:
        labels = labels.masked_fill(places == 0, -100)
    parts = {"train": slice(8, None), "validation": slice(0, 4), "test": slice(4, 8)}
    return Data(
        *(ids[part] for part in parts.values()), "", {},
        {name: places[part] for name, part in parts.items()} if positions else {},
        {name: labels[part] for name, part in parts.items()},
    )  # fmt: skip


LOSSES = {"cross_entropy": Distillation(0.0), "kl": Distillation(), "mix": Distillation(0.5)}


def run(directory: Path, settings: list[str], positions: bool = False) -> tuple[Any, Any]:
    config = load_config("paper-sinks", settings)
    torch.manual_seed(1)
    model = lolcats.convert(tiny_model(), config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # logits in which student and teacher differ
    return finetune(model, data(positions), config, directory)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_predicted_token_of_a_step_counts_the_same(loss: str, settings: list[str], tmp_path: Path) -> None:
    """However rows are cut into micro-batches, also where one holds none. The validation loss is a mean over tokens."""
    own = [*settings, f"finetune.loss={loss}"]
    wrapped, result = run(tmp_path / "a", [*own, "finetune.micro_batch_size=4"])
    small, other = run(tmp_path / "b", [*own, "finetune.micro_batch_size=1"])
    assert result.best_loss == pytest.approx(other.best_loss, rel=1e-5)
    for name, parameter in wrapped.named_parameters():
        torch.testing.assert_close(small.get_parameter(name), parameter, atol=1e-6, rtol=1e-4)
    held_out = data()
    with torch.no_grad():
        expected = naive(wrapped.eval(), held_out.validation, LOSSES[loss], labels=held_out.labels["validation"])
    assert result.best_loss == pytest.approx(expected.item(), rel=1e-5)
    losses = [[e["loss"] for e in r.history if "loss" in e] for r in (result, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_continues_bit_for_bit(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [*settings, "finetune.loss=mix", "finetune.micro_batch_size=1"]
    expected, _ = run(tmp_path / "a", own, positions=True)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run(tmp_path / "b", own, positions=True)
    resumed, _ = run(tmp_path / "b", own, positions=True)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_through_the_pipeline(model_dirs, chat_file: Path, settings: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    config = load_config("paper-sinks", [*settings, "data.loss=completion", "finetune.loss=kl"])
    pipeline.linearize(str(model_dirs["llama"]), str(chat_file), tmp_path, config, say=said.append)
    assert any("of the tokens of the validation rows are answers" in line for line in said)
    assert read_tensors(tmp_path / "lora" / "adapter_model.safetensors")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"]["loss"] == "completion"
    assert record["stages"]["finetune"]["loss"] == "kl"
    words = "the KL divergence from the teacher, on completions only"
    assert any(f"Stage 2: low-rank linearizing on {words}: " in line for line in said)
    assert f"LoRA was trained on {words}." in (tmp_path / "README.md").read_text()
    mix = load_config("paper-sinks", ["finetune.loss=mix", "finetune.kl_weight=0.3", "finetune.kl_temperature=2"])
    assert loss_of(mix) == (
        "0.7 × the next-token loss + 0.3 × the KL divergence from the teacher at temperature 2, times its square"
    )
    assert loss_of(load_config("paper-sinks")) == "the next-token loss"
