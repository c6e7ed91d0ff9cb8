"""A converted model is to transformers, PEFT, accelerate and liger-kernel what the model was before."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from huggingface_hub import HfApi, ModelCard
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny import tiny
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GlmConfig,
    GlmForCausalLM,
    MixtralForCausalLM,
    MixtralModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling import others
from lolcats.modeling.classes import linearized_class
from lolcats.modeling.layer import linearized_layers, override

IDS = torch.randint(6, 300, (2, 24), generator=torch.Generator().manual_seed(0))


SMALL = AttentionConfig(window_size=4, sinks=2, feature_dim=4)


def lol(family: str = "llama", **settings: Any) -> Any:
    return lolcats.convert(tiny_model(family), dataclasses.replace(SMALL, **settings))


def smoothed(model: Any, directory: Path) -> Tensor:
    arguments = TrainingArguments(output_dir=str(directory), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    return Trainer(model, arguments).compute_loss(model, {"input_ids": IDS, "labels": IDS}).detach()


@pytest.mark.parametrize("wrapped", [False, True])
def test_label_smoothing_shifts_the_labels(wrapped: bool, tmp_path: Path) -> None:
    models = [tiny_model(), lol(kind="softmax")]
    if wrapped:
        models = [get_peft_model(m, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])) for m in models]
    plain, ours = (smoothed(model, tmp_path) for model in models)
    torch.testing.assert_close(ours, plain)


def test_listed_by_name_where_the_base_is() -> None:
    before = {k: set(map(str, v.values())) for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES")}
    listed = {title for title, names in before.items() if "GlmForCausalLM" in names}
    assert listed
    linearized_class(GlmForCausalLM)
    assert all("LolcatsGlmForCausalLM" in getattr(modeling_auto, title).values() for title in listed)
    small = GlmConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, head_dim=16, pad_token_id=0)  # fmt: skip
    assert type(AutoModelForCausalLM.from_config(small)) is GlmForCausalLM
    assert list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.items())


@pytest.mark.parametrize(
    ("title", "head"),
    [
        ("MODEL_MAPPING", "Model"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "ForSequenceClassification"),
        ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "ForTokenClassification"),
    ],
)
def test_classes_with_another_head_are_listed_where_the_base_is(title: str, head: str) -> None:
    linearized_class(GlmForCausalLM)
    assert f"LolcatsGlm{head}" in getattr(modeling_auto, f"{title}_NAMES").values()
    assert f"LolcatsGlm{head}" not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert getattr(modeling_auto, title)[GlmConfig].__name__ == f"Glm{head}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_default_lora_targets_are_those_of_the_family(family: str) -> None:
    for kind in (LoraConfig, IA3Config):
        plain, ours = (get_peft_model(m, kind(task_type="CAUSAL_LM")) for m in (tiny_model(family), lol(family)))
        targets = [sorted(m.peft_config["default"].target_modules) for m in (plain, ours)]
        assert targets[0] == targets[1]
        assert ours.config.model_type == ours.config.to_dict()["model_type"] == "lolcats"


@pytest.mark.parametrize("first", ["import peft", "import lolcats.modeling.classes"])
def test_peft_is_taught_whichever_is_imported_first(first: str) -> None:
    code = f"""
{first}
import lolcats.modeling.classes, peft
from types import SimpleNamespace
from peft.tuners.tuners_utils import BaseTuner, _check_lora_target_modules_mamba as check
def config(**fields):
    return SimpleNamespace(config=SimpleNamespace(to_dict=lambda: fields, **fields))
ours = config(model_type="lolcats", base_model_type="falcon_h1")
assert BaseTuner.get_model_config(ours)["model_type"] == "falcon_h1"
assert BaseTuner.get_model_config(config(model_type="llama"))["model_type"] == "llama"
try:
    check(peft.LoraConfig(), ours, "out_proj")
except ValueError as error:
    assert "falcon_h1" in str(error)
else:
    raise AssertionError("LoRA on a projection that Mamba's kernels read directly")
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL)


def test_liger_applies_the_patch_of_the_family() -> None:
    applied: list[Any] = []

    def llama(rope: bool = True, swiglu: bool = True, model: Any = None) -> None:
        applied.append(("llama", rope, swiglu, model))

    def gemma(geglu: bool = True, model: Any = None) -> None:
        applied.append(("gemma", geglu, model))

    module = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": llama, "gemma": gemma})
    others.CHANGES["liger_kernel.transformers.monkey_patch"](module)
    table, model = module.MODEL_TYPE_TO_APPLY_LIGER_FN, lol()
    options = {"rope": False, "geglu": False, "unknown": 1}  # as liger's _apply_liger_kernel_to_instance does it
    known = {k: v for k, v in options.items() if k in inspect.signature(table["lolcats"]).parameters}
    table["lolcats"](model=model, **known)
    assert applied == [("llama", False, True, model)]
    table["lolcats"]()
    assert len(applied) == 1


@torch.no_grad()
@pytest.mark.parametrize("way", ["class", "from_config", "config=", "attn_implementation=", "copied config"])
def test_built_from_a_linearized_configuration(way: str, tmp_path: Path) -> None:
    model = lol(layers={"1": "softmax"})
    model.save_pretrained(tmp_path)
    if way == "class":
        again = type(model)(model.config)
    elif way == "from_config":
        again = AutoModelForCausalLM.from_config(model.config)
    elif way == "config=":
        again = AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config)
    elif way == "copied config":
        again = type(model)(copy.deepcopy(model.config))
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lolcats")
    again.eval().load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with override(again, mode="teacher"), override(model, mode="teacher"):
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert torch.equal(again(IDS).logits, tiny_model()(IDS).logits)


@torch.no_grad()
def test_another_base_implementation_is_kept(tmp_path: Path) -> None:
    lol(layers={"1": "softmax"}).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.model.layers[1].self_attn.lolcats.base_implementation == "eager"
    with pytest.raises(LolcatsError, match="silently become softmax"):
        model.set_attn_implementation(attn_implementation="sdpa")


def test_a_vision_part_never_gets_our_attention(tmp_path: Path) -> None:
    lolcats.convert(tiny("gemma3"), SMALL).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lolcats")
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "lolcats"


UNPICKLE = """
import pickle, sys, torch
model, config, logits, ids = pickle.load(open(sys.argv[1] + "/pickle", "rb"))
again = torch.load(sys.argv[1] + "/torch", weights_only=False)
assert type(config) is type(model.config) is type(again.config) and config.model_type == "lolcats"
with torch.no_grad():
    assert torch.equal(model(ids).logits, logits) and torch.equal(again(ids).logits, logits)
model.save_pretrained(sys.argv[1] + "/saved")
"""


@torch.no_grad()
def test_pickled_for_another_process(tmp_path: Path) -> None:
    model = lol(layers={"1": "linear"})
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    logits = model(IDS).logits
    (tmp_path / "pickle").write_bytes(pickle.dumps((model, model.config, logits, IDS)))
    torch.save(model, tmp_path / "torch")
    subprocess.run([sys.executable, "-c", UNPICKLE, str(tmp_path)], check=True, stdin=subprocess.DEVNULL)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits, logits)


def in_another_process(config: Any, model: Any, ids: Tensor, answers: Any) -> None:
    with torch.no_grad():
        answers.put((config.base_model_type, model(ids).logits.numpy()))


def test_sent_to_a_spawned_process() -> None:
    model, context = lol(), torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=in_another_process, args=(model.config, model, IDS, answers))
    process.start()
    family, logits = answers.get(timeout=120)
    process.join(60)
    assert family == "llama"
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(logits), model(IDS).logits)


@torch.no_grad()
def test_saved_and_loaded_by_keyword(tmp_path: Path) -> None:
    model = lol()
    model.save_pretrained(save_directory=tmp_path)
    again = type(model).from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    again, info = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path, output_loading_info=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not info["missing_keys"]


@pytest.mark.parametrize("part", ["model", "model.push_to_hub", "config"])
def test_upload_holds_the_file_that_auto_map_names(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lol()
    if part == "config":
        model.save_pretrained(tmp_path / "once")  # sets auto_map
    uploaded = uploads(monkeypatch)
    if part == "model.push_to_hub":
        model.push_to_hub("someone/model")
    else:
        saved = model if part == "model" else model.config
        saved.save_pretrained(str(tmp_path / "d"), push_to_hub=True, repo_id="someone/model")
    assert {"config.json", "modeling_lolcats.py"} <= uploaded


def uploads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the files that would be uploaded to the hub from now on."""
    names: set[str] = set()

    def create_commit(self: Any, repo_id: str, operations: Any, **_: Any) -> Any:
        names.update(operation.path_in_repo for operation in operations)
        return SimpleNamespace(commit_url="", oid="", pr_url=None)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_branch", lambda self, **_: None)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    for module in ("modeling_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    return names


class Derived(linearized_class(GlmForCausalLM)):  # type: ignore[misc]
    """As another project might do it."""


def test_a_derived_class_is_pickled_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(Derived)) is Derived
    assert cloudpickled(lol().config).base_model_type == "llama"


def cloudpickled(thing: Any) -> Any:
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(thing))


KINDS: list[dict[str, Any]] = [
    {}, {"kind": "linear"}, {"kind": "window"}, {"layers": {"0": "linear"}}, {"layers": {"1": "softmax"}},
    {"kind": "linear", "normalizer": "group_norm"}, {"kind": "linear", "decay": "retnet"}, {"layers": {"0": "window"}},
]  # fmt: skip


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("length", [2, 24])
def test_every_trainable_parameter_gets_a_gradient(settings: dict[str, Any], length: int, tmp_path: Path) -> None:
    model = lol(**settings)
    model.save_pretrained(tmp_path)
    for trained in (model, AutoModelForCausalLM.from_pretrained(tmp_path), type(model)(model.config)):
        trained(IDS[:, :length], labels=IDS[:, :length]).loss.backward()
        assert {name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None} == set()
        trainable = {name for name, p in trained.named_parameters() if p.requires_grad}
        gates = any(name.endswith(".lolcats.gate") for name in trainable)
        assert gates == any(layer.spec.has_softmax and layer.spec.has_linear for layer in linearized_layers(model))


DDP = """
import os, sys, torch, lolcats
import torch.distributed as dist
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/meeting", rank=0, world_size=1)
for name in ("linear", "window", "mixed"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/" + name)
    model = torch.nn.parallel.DistributedDataParallel(model)
    ids = torch.arange(10, 34)[None]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
dist.destroy_process_group()
"""


def test_ddp_needs_no_search_for_unused_parameters(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "linear": {"kind": "linear"}, "window": {"kind": "window"}, "mixed": {"layers": {"0": "linear"}},
    }  # fmt: skip
    for name, settings in kinds.items():
        lol(**settings).save_pretrained(tmp_path / name)
    subprocess.run([sys.executable, "-c", DDP, str(tmp_path)], check=True, stdin=subprocess.DEVNULL)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"kind": "linear", "layers": {"1": "softmax"}}, {"feature_inputs": "unrotated"}], ids=str
)
def test_peft_trains_a_copy_of_our_modules(settings: dict[str, Any], tmp_path: Path) -> None:
    model = lol(**settings)
    before, softmax = model(IDS).logits, tiny_model()(IDS).logits
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lolcats"])
    wrapped = get_peft_model(model, lora)
    assert torch.equal(wrapped(IDS).logits, before)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    with torch.enable_grad():
        wrapped(IDS, labels=IDS).loss.backward()
    copies = {name: p for name, p in wrapped.named_parameters() if ".lolcats.modules_to_save" in name}
    assert all(p.grad is not None for name, p in copies.items() if ".phi_" in name)
    optimizer.step()
    trained = wrapped.eval()(IDS).logits
    assert not torch.equal(trained, before)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(IDS).logits, before)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(lol(**settings), tmp_path).eval()
    assert torch.equal(again(IDS).logits, trained)
    generated = again.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(IDS, max_new_tokens=6, do_sample=False), generated)
    with override(merged, mode="teacher"):
        merged.generate(IDS, max_new_tokens=2)  # with transformers' cache
    with override(wrapped, mode="teacher"), wrapped.disable_adapter():
        assert torch.equal(wrapped(IDS).logits, softmax)


def test_what_peft_cannot_do_says_what_to_do() -> None:
    wrapped = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(LolcatsError, match="Convert the model before you wrap it"):
        lolcats.convert(wrapped, SMALL)
    with pytest.raises(LolcatsError, match="already linearized"):
        lolcats.convert(get_peft_model(lol(), LoraConfig(task_type="CAUSAL_LM")), SMALL)
    prefix = get_peft_model(lol(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(LolcatsError, match="use LoRA or prompt tuning"):
        prefix(input_ids=IDS)
    prompt = get_peft_model(lol(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert prompt(input_ids=IDS, labels=IDS).loss.isfinite()
    with pytest.raises(LolcatsError, match="not a transformers model"):
        lolcats.convert(torch.nn.Linear(2, 2), SMALL)  # type: ignore[arg-type]


EXPORTED: list[dict[str, Any]] = [
    {}, {"kind": "linear"}, {"kind": "window"}, {"layers": {"1": "softmax"}}, {"feature_inputs": "unrotated"},
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("settings", EXPORTED, ids=str)
def test_exported(settings: dict[str, Any]) -> None:
    model = lol(**settings)
    exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False).module()
    other = IDS.flip(0)
    torch.testing.assert_close(exported(other, use_cache=False).logits, model(other, use_cache=False).logits)


@torch.no_grad()
def test_exported_with_a_padding_mask() -> None:
    model, mask = lol(), torch.ones_like(IDS)
    exported = torch.export.export(model, (IDS, mask), {"use_cache": False}, strict=False).module()
    padded = mask.clone()
    padded[0, :5] = 0
    for given in (mask, padded):
        expected = model(IDS, given, use_cache=False).logits
        got = exported(IDS, given, use_cache=False).logits
        torch.testing.assert_close(got[given.bool()], expected[given.bool()])


@torch.no_grad()
def test_an_exported_program_refuses_packed_rows() -> None:
    model, positions = lol(), torch.arange(IDS.shape[1]).expand(IDS.shape)
    options = {"position_ids": positions, "use_cache": False}
    exported = torch.export.export(model, (IDS,), options, strict=False).module()
    got = exported(IDS, position_ids=positions + 3, use_cache=False).logits
    torch.testing.assert_close(got, model(IDS, position_ids=positions + 3, use_cache=False).logits)
    with pytest.raises(RuntimeError, match="does not take packed rows"):
        exported(IDS, position_ids=positions % 10, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "gemma3_text", "gemma3", "phi"])
def test_loaded_without_a_head_or_with_another(family: str, tmp_path: Path) -> None:
    model = lolcats.convert(tiny(family), SMALL)
    model.save_pretrained(tmp_path / "whole")
    ids = IDS % model.config.get_text_config().vocab_size
    expected = model.base_model(ids)[0]
    bare = AutoModel.from_pretrained(tmp_path / "whole")
    assert len(linearized_layers(bare)) == len(linearized_layers(model))
    assert torch.equal(bare(ids)[0], expected)
    bare.save_pretrained(tmp_path / "bare")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare")(ids)[0], expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    assert torch.equal(classifier.base_model(ids)[0], expected)
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    again.config.get_text_config().pad_token_id = classifier.config.get_text_config().pad_token_id = 0
    assert torch.equal(again(ids).logits, classifier(ids).logits)
    assert again(ids).logits.shape == (2, 3)


@torch.no_grad()
def test_headless_models_are_strict_and_like_others(tmp_path: Path) -> None:
    model = lol()
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(bare))(IDS)[0], bare(IDS)[0])
    assert type(AutoModel.from_config(model.config)) is type(bare)
    with override(bare, mode="teacher"):
        assert torch.equal(bare(IDS)[0], tiny_model().model(IDS)[0])
    state = bare(IDS[:, :20]).past_key_values
    torch.testing.assert_close(bare(IDS[:, 20:], past_key_values=state)[0], bare(IDS, use_cache=False)[0][:, 20:])
    config = AutoConfig.from_pretrained(tmp_path)
    config.lolcats["form"] = "adapter"
    with pytest.raises(LolcatsError, match="Merge it first"):
        AutoModel.from_pretrained(tmp_path, config=config)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.lolcats.phi_q.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        with pytest.raises(LolcatsError, match=r"phi_q\.weight is missing"):
            auto.from_pretrained(tmp_path)


@torch.no_grad()
def test_another_number_of_labels(tmp_path: Path) -> None:
    lol().save_pretrained(tmp_path / "lm")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=2)
    found.save_pretrained(tmp_path / "two")
    with pytest.raises(LolcatsError, match=r"score\.weight has shape \(2, 32\)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "two", num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "two", num_labels=5, ignore_mismatched_sizes=True
    )
    assert model(IDS[:1]).logits.shape == (1, 5)
    assert torch.equal(model.model(IDS)[0], found.model(IDS)[0])


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_decoders_are_strict_whatever_is_ignored(auto: Any, tmp_path: Path) -> None:
    model = lol()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    torch.testing.assert_close(again.base_model(IDS)[0], model.model(IDS)[0])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LolcatsError, match=r"norm\.weight has shape \(7,\)"):
        auto.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_experts_are_computed_as_in_the_base(auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("mixtral")
    usual = base.config._experts_implementation
    lolcats.convert(base, SMALL).save_pretrained(tmp_path)
    for kind in (MixtralForCausalLM, MixtralModel):  # as in a new process
        monkeypatch.delattr(kind, "_can_set_experts_implementation_cached_value", raising=False)
    model = auto.from_pretrained(tmp_path)
    assert model.config._experts_implementation == usual == "grouped_mm"
    assert type(auto.from_config(model.config)) is type(model)
    model.set_experts_implementation("batched_mm")
    assert model.config._experts_implementation == "batched_mm"


def test_models_with_images_are_found_where_their_base_is(tmp_path: Path) -> None:
    model = lolcats.convert(tiny("gemma3"), SMALL)
    model.save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)
