"""Checkpoints of the paper's own code: their keys and shapes, and that they describe our function.

The files here come from a small independent implementation of that code's documented formula, not from running it.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_cli import invoke
from torch import Tensor
from transformers import AttentionInterface

import lolcats
from lolcats.config import load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation.perplexity import perplexity
from lolcats.modeling.layer import linearized_layers
from lolcats.reference_import import import_reference
from lolcats.selection import Selection
from lolcats.weights.base import find_base

HEADS, KV_HEADS, DIM, HIDDEN, LAYERS, FEATURES, WINDOW, RANK = 4, 2, 8, 32, 2, 6, 8, 4
PREFIX = "base_model.model.model."
PROJECTIONS = {"q_proj": HEADS * DIM, "k_proj": KV_HEADS * DIM, "v_proj": KV_HEADS * DIM, "o_proj": HIDDEN}
SETTINGS = [f"attention.window_size={WINDOW}", "data.sequence_length=32"]


def transfer_state(prefix: str = "model.", window: bool = True, bias: int = 0, columns: int = FEATURES) -> dict:
    """bf16 parameters, as that code saves them: (H, D, f) maps and (1, H, 1, 1) window factors."""
    torch.manual_seed(3)
    state: dict[str, Tensor] = OrderedDict()
    for layer in range(LAYERS):
        place = f"{prefix}layers.{layer}.self_attn."
        for which in "qk":
            weight = torch.randn(HEADS, DIM, columns).bfloat16()
            state[f"{place}feature_map_{which}.mlp.layer"] = torch.nn.Parameter(weight)
            if bias:
                state[f"{place}feature_map_{which}.mlp.bias"] = torch.randn(1, HEADS, 1, bias).bfloat16()
        if window:
            state[f"{place}window_factors"] = (torch.randn(1, HEADS, 1, 1) - 1).bfloat16()
    return state


def lora_state(projections: tuple[str, ...] = tuple(PROJECTIONS)) -> dict:
    torch.manual_seed(4)
    state: dict[str, Tensor] = OrderedDict()
    for layer in range(LAYERS):
        for name in projections:
            place = f"{PREFIX}layers.{layer}.self_attn.{name}.lora_"
            state[f"{place}A.default.weight"] = torch.randn(RANK, HIDDEN).bfloat16() / 8
            state[f"{place}B.default.weight"] = torch.randn(PROJECTIONS[name], RANK).bfloat16() / 8
    return state


def save(state: dict, path: Path, bare: bool = False) -> Path:
    torch.save(state if bare else {"model_state_dict": state, "step": 100, "eval/loss": 0.5}, path)
    return path


def their_formula(q: Tensor, k: Tensor, v: Tensor, layer: dict[str, Tensor], terraced: bool, scale: float) -> Tensor:
    """One token at a time, as documented there: the softmax weights of the window shifted by their maximum and weighted
    with sigmoid(window_factors), plus φ(q)·φ(k) of all older keys, divided by the sum of both."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    def feature_map(x: Tensor, which: str) -> Tensor:
        y = torch.einsum("hdf,bhld->bhlf", layer[f"feature_map_{which}.mlp.layer"].float(), x)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12)

    fq, fk = feature_map(q, "q"), feature_map(k, "k")
    factor = torch.sigmoid(layer["window_factors"].float())[0]
    outputs = []
    for n in range(q.shape[2]):
        first = max(0, (n // WINDOW - 1) * WINDOW if terraced else n - WINDOW + 1)
        s = (q[:, :, n : n + 1] @ k[:, :, first : n + 1].mT * scale)[:, :, 0]
        near = factor[..., 0] * torch.exp(s - s.amax(-1, keepdim=True))
        far = (fq[:, :, n : n + 1] @ fk[:, :, :first].mT)[:, :, 0]
        weights = torch.cat([far, near], -1)
        weights = weights / weights.sum(-1, keepdim=True)
        outputs.append((weights[:, :, None] @ v[:, :, : n + 1])[:, :, 0])
    return torch.stack(outputs, 1)


def reference_logits(transfer: dict, lora: dict, alpha: float, terraced: bool, ids: Tensor) -> Tensor:
    """The whole model by that formula, LoRA folded in as W + α/r · BA."""
    model = tiny_model()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for name in PROJECTIONS:
                place = f"{PREFIX}layers.{layer}.self_attn.{name}.lora_"
                if f"{place}A.default.weight" in lora:
                    a, b = (lora[f"{place}{m}.default.weight"].float() for m in "AB")
                    getattr(block.self_attn, name).weight += alpha / RANK * b @ a

    def attend(module, q, k, v, mask, scaling=None, **_):
        prefix = f"model.layers.{module.layer_idx}.self_attn."
        own = {name.removeprefix(prefix): x.detach() for name, x in transfer.items() if name.startswith(prefix)}
        return their_formula(q, k, v, own, terraced, scaling), None

    AttentionInterface.register("their_formula", attend)
    model.config._attn_implementation = "their_formula"
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_imported_model_computes_their_function(window: str, model_dirs, chat_file: Path, tmp_path: Path) -> None:
    """At lengths that are multiples of the window and at least two windows; for others that code is not an oracle."""
    transfer, lora = transfer_state(), lora_state()
    files = save(transfer, tmp_path / "a.pt"), save(lora, tmp_path / "b.pt", bare=True)
    out = tmp_path / "out"
    invoke(
        "import", "--base", model_dirs["llama"], "--transfer", files[0], "--lora", files[1], "--out", out,
        *(word for s in (*SETTINGS, f"attention.window={window}", "finetune.alpha=12") for word in ("--set", s)),
    )  # fmt: skip
    model = lolcats.load(out)
    for tokens in (2 * WINDOW, 3 * WINDOW, 8 * WINDOW):
        ids = torch.randint(6, 300, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        expected = reference_logits(transfer, lora, 12, window == "terraced", ids)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert "teacher" in invoke("evaluate", out, "--data", chat_file, "--rows", 2)
    assert 1 < perplexity(model, torch.randint(6, 300, (2, 32))) < 1e5


def test_key_table(model_dirs, tmp_path: Path) -> None:
    """Each of their tensors ends up in ours, value by value; window factors lose their broadcast dimensions."""
    state = transfer_state()
    files = save(state, tmp_path / "a.pt"), save(lora_state(("q_proj", "v_proj")), tmp_path / "b.pt")
    import_reference(str(model_dirs["llama"]), *files, tmp_path / "out", load_config("paper", SETTINGS))
    model = lolcats.load(tmp_path / "out")
    for number, layer in enumerate(linearized_layers(model)):
        place = f"model.layers.{number}.self_attn."
        assert torch.equal(layer.phi_q.weight, state[f"{place}feature_map_q.mlp.layer"].float())
        assert torch.equal(layer.phi_k.weight, state[f"{place}feature_map_k.mlp.layer"].float())
        assert torch.equal(layer.gate, state[f"{place}window_factors"].float().flatten())
    base, attention = tiny_model(), model.model.layers[0].self_attn
    assert torch.equal(attention.k_proj.weight, base.model.layers[0].self_attn.k_proj.weight)
    assert not torch.equal(attention.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)


def test_feature_maps_of_the_second_file_replace_those_of_the_first(model_dirs, tmp_path: Path) -> None:
    """If stage 2 trained them too, its file contains them along with LoRA."""
    later = {name: x.detach() + 1 for name, x in transfer_state(PREFIX).items()}
    files = save(transfer_state(), tmp_path / "a.pt"), save(lora_state() | later, tmp_path / "b.pt")
    import_reference(str(model_dirs["llama"]), *files, tmp_path / "out", load_config("paper", SETTINGS))
    layer = linearized_layers(lolcats.load(tmp_path / "out"))[1]
    assert torch.equal(layer.gate, later[f"{PREFIX}layers.1.self_attn.window_factors"].float().flatten())


@pytest.mark.parametrize("bias", [1, DIM])
def test_t2r_and_pure_linear_attention(bias: int, model_dirs, tmp_path: Path) -> None:
    state = transfer_state(window=False, bias=bias, columns=DIM)
    config = load_config("paper", [*SETTINGS, "attention.kind=linear", "attention.feature_map=t2r"])
    import_reference(str(model_dirs["llama"]), save(state, tmp_path / "a.pt"), None, tmp_path / "out", config)
    model = lolcats.load(tmp_path / "out")
    theirs = state["model.layers.0.self_attn.feature_map_k.mlp.bias"].float()[0, :, 0]
    assert torch.equal(linearized_layers(model)[0].phi_k.bias, theirs.expand(HEADS, DIM))
    assert model(torch.randint(6, 300, (1, 20))).logits.isfinite().all()


def test_heads_that_stay_softmax_have_no_maps(model_dirs, tmp_path: Path) -> None:
    """A head of one layer and the whole other layer: their maps are left out, LoRA is that of all layers."""
    state, lora = transfer_state(), lora_state()
    files = save(state, tmp_path / "a.pt"), save(lora, tmp_path / "b.pt")
    heads = "attention.softmax_heads={0: [0], 1: [0, 1]}"
    invoke(
        "import", "--base", model_dirs["llama"], "--transfer", files[0], "--lora", files[1], "--out", tmp_path / "out",
        *(word for s in (*SETTINGS, heads) for word in ("--set", s)),
    )  # fmt: skip
    model = lolcats.load(tmp_path / "out")
    [layer] = linearized_layers(model)
    place = "model.layers.0.self_attn."
    assert torch.equal(layer.phi_q.weight, state[f"{place}feature_map_q.mlp.layer"].float()[2:])
    assert torch.equal(layer.phi_k.weight, state[f"{place}feature_map_k.mlp.layer"].float()[2:])
    assert torch.equal(layer.gate, state[f"{place}window_factors"].float().flatten()[2:])
    assert "3 of 4" in invoke("info", tmp_path / "out")
    import_reference(str(model_dirs["llama"]), *files, tmp_path / "all", load_config("paper", [
        *SETTINGS, "attention.softmax_heads={0: [0, 1]}", "attention.layers={'1': softmax}"]))  # fmt: skip
    kept, base = lolcats.load(tmp_path / "all"), tiny_model()
    with torch.no_grad():
        for number, block in enumerate(base.model.layers):
            for name in PROJECTIONS:
                a, b = (lora[f"{PREFIX}layers.{number}.self_attn.{name}.lora_{m}.default.weight"].float() for m in "AB")
                getattr(block.self_attn, name).weight += load_config("paper").finetune.alpha / RANK * b @ a
        ids = torch.randint(6, 300, (1, 40))
        torch.testing.assert_close(kept(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)


def test_biases_and_a_selection_file(model_dirs, tmp_path: Path) -> None:
    file = save(transfer_state(window=False, bias=1, columns=DIM), tmp_path / "a.pt")
    base = find_base(str(model_dirs["llama"]))
    Selection(base.record, {}, {"1": [1]}, [], {}).write(tmp_path / "heads.yaml")
    settings = [*SETTINGS, "attention.kind=linear", "attention.feature_map=t2r"]
    words = [word for s in settings for word in ("--set", s)]
    invoke("import", "--base", base.path, "--transfer", file, "--out", tmp_path / "out", *words, "--selection",
           tmp_path / "heads.yaml")  # fmt: skip
    biases = [layer.phi_k.bias for layer in linearized_layers(lolcats.load(tmp_path / "out"))]
    assert [len(bias) for bias in biases] == [4, 2]
    theirs = transfer_state(window=False, bias=1, columns=DIM)["model.layers.1.self_attn.feature_map_k.mlp.bias"]
    assert torch.equal(biases[1], theirs.float()[0, :2, 0].expand(2, DIM))


@pytest.mark.parametrize(
    ("setting", "heads", "message"),
    [
        ("attention.softmax_budget=0.5", HEADS, "lolcats import does not search for heads"),
        ("attention.softmax_heads={0: [1]}", HEADS - 2, r"has shape \(2, 8, 6\); .* need \(4, 8, 6\)"),
        ("attention.softmax_heads={5: [1]}", HEADS, "no attention layer 5"),
    ],
)
def test_kept_heads_that_do_not_fit(setting: str, heads: int, message: str, model_dirs, tmp_path: Path) -> None:
    state = {n: x[:heads] if "mlp.layer" in n else x for n, x in transfer_state().items()}
    config = load_config("paper", [*SETTINGS, setting])
    with pytest.raises(LolcatsError, match=message):
        import_reference(str(model_dirs["llama"]), save(state, tmp_path / "a.pt"), None, tmp_path / "out", config)


def spoiled(what: str) -> tuple[dict, dict]:
    transfer, lora = transfer_state(), lora_state()
    name, matrix = "model.layers.1.self_attn.window_factors", f"{PREFIX}layers.1.self_attn.o_proj.lora_B.default.weight"
    if what == "missing":
        del transfer[name]
    elif what == "unexpected":
        transfer["model.layers.1.self_attn.feature_map_v.mlp.layer"] = transfer[name]
    elif what == "other layer":
        transfer["model.layers.7.self_attn.window_factors"] = transfer[name]
    elif what == "shape":
        transfer[name] = torch.zeros(1, HEADS + 1, 1, 1)
    elif what == "lora missing":
        del lora[matrix]
    elif what == "lora shape":
        lora[matrix] = torch.zeros(HIDDEN, RANK + 1)
    elif what == "no lora":
        lora = transfer_state(PREFIX)
    elif what == "lora first":
        transfer |= lora
    return transfer, lora


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"a\.pt: tensor layers\.1\.self_attn\.window_factors is missing"),
        ("unexpected", r"a\.pt: unexpected tensor model\.layers\.1\.self_attn\.feature_map_v"),
        ("other layer", r"a\.pt: unexpected tensor layers\.7\.self_attn\.window_factors"),
        ("shape", r"a\.pt: tensor layers\.1\.self_attn\.window_factors has shape \(1, 5, 1, 1\)"),
        ("lora missing", r"b\.pt: tensor layers\.1\.self_attn\.o_proj\.lora_B\.default\.weight is missing"),
        ("lora shape", r"b\.pt: tensor layers\.1\.self_attn\.o_proj\.lora_B\.default\.weight has shape \(32, 5\)"),
        ("no lora", r"b\.pt has no LoRA matrices"),
        ("lora first", r"pass this file as --lora"),
    ],
)
def test_strict(what: str, message: str, model_dirs, tmp_path: Path) -> None:
    transfer, lora = spoiled(what)
    files = save(transfer, tmp_path / "a.pt"), save(lora, tmp_path / "b.pt")
    with pytest.raises(LolcatsError, match=message):
        import_reference(str(model_dirs["llama"]), *files, tmp_path / "out", load_config("paper", SETTINGS))
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (print, ("a pickle was run",))


def test_files_that_are_no_checkpoints(model_dirs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state_dict": {"x": Evil()}}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("nothing")
    (tmp_path / "cut.pt").write_bytes(save(transfer_state(), tmp_path / "a.pt").read_bytes()[:3000])
    base, config = str(model_dirs["llama"]), load_config("paper", SETTINGS)
    for name in ("evil", "list", "text", "cut", "absent"):
        with pytest.raises(LolcatsError, match=f"{name}.pt"):
            import_reference(base, tmp_path / f"{name}.pt", None, tmp_path / "out", config)
    assert "a pickle was run" not in capfd.readouterr().out
