"""Stage 2, low-rank linearizing: train LoRA on the next-token loss of the linearized model, or on its distance from the
teacher; feature maps are frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lolcats.config import Config, FinetuneConfig
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import LORA_WEIGHTS
from lolcats.modeling.convert import convert
from lolcats.modeling.families import FUSED, MLP, PROJECTIONS
from lolcats.modeling.install import inputs_of
from lolcats.modeling.liger import fused_layers
from lolcats.modeling.loss import Head, find_head, language_model_loss, next_tokens
from lolcats.modeling.skeleton import convert_empty, empty_model, light_weights
from lolcats.ranks import ranks
from lolcats.stages import cuda_graph
from lolcats.stages.distributed import fill_part, is_sharded, materialize, own_device, shard
from lolcats.stages.finetune.distillation import Distillation, distillation_loss, is_frozen
from lolcats.stages.finetune.graph import PassGraphs, graph_for, zero
from lolcats.stages.finetune.lora import LeanLora
from lolcats.stages.finetune.protection import kept_layers, kept_rows, protected
from lolcats.stages.finetune.trainer import StageTrainer
from lolcats.stages.micro_batch import recomputes, settled
from lolcats.stages.result import StageResult
from lolcats.stages.trained import train_only, trainable
from lolcats.stages.watch import first_bad_layer, first_bad_weight
from lolcats.tensors import load_strictly, read_tensors
from lolcats.weights.base import Base, load_model
from lolcats.weights.shards import OtherNames, shards_of


def finetune(
    model: PreTrainedModel | PeftModel, data: Data, config: Config, directory: Path
) -> tuple[PeftModel, StageResult]:  # fmt: skip
    """Wrap ``model`` with LoRA (PEFT) and train it; only LoRA matrices are trained unless the recipe says otherwise.

    Under torchrun, every rank trains a copy of the model on its own rows, and all end with the same weights. With
    ``finetune.sharding=always`` the model is first sharded across all ranks, and stays sharded.

    Args:
        model: converted model in any float dtype; LoRA matrices are fp32.
        data: rows (N, L) of token ids.
        directory: run directory, for ``metrics.jsonl`` and working files under ``checkpoints/finetune``.

    Returns:
        The PEFT model with its best weights (``.merge_and_unload()`` merges them), and the result of the stage.
    """
    torch.manual_seed(config.seed)
    wrapped = model if isinstance(model, PeftModel) else add_lora(model, config.finetune)
    model = wrapped.get_base_model()
    if ranks().size > 1 and config.finetune.sharding == "always" and not is_sharded(model):
        shard(model, own_device(model.device))
    working = directory / "checkpoints" / "finetune"

    def trainer(stage: FinetuneConfig, report_to: list[str]) -> FinetuneTrainer:
        return FinetuneTrainer(
            wrapped, stage, data.dataset("train"), data.dataset("validation"), "finetune", working,
            directory / "metrics.jsonl", config.seed, report_to,
        )  # fmt: skip

    def trial(rows: int) -> None:
        trainer(replace(config.finetune, micro_batch_size=rows), []).try_step()

    with fused_layers(model, config.finetune.liger), protected(wrapped, config.finetune.protect_kept):
        tried = None if is_sharded(model) else trial
        if recomputes(config.finetune, config.data.sequence_length, working, model.device, tried):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        stage = settled(config.finetune, working, model.device, tried)
        own = trainer(stage, config.report_to)
        own.graphs.asked = graph_for(stage.cuda_graph, model, data, stage)
        try:
            return wrapped, own.run()
        finally:  # its memory, which a trainer would keep until it is collected
            own.graphs = PassGraphs()
            own.forget_gradients()


def add_lora(model: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """Add LoRA to ``config.targets``, and freeze all parameters that are not trained: with a learning rate of 0 LoRA,
    too, which then stays zero and is not computed."""
    targets = trained_layers(model, config)
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none",
        task_type="CAUSAL_LM", use_dora=config.use_dora, use_rslora=config.use_rslora,
    )  # fmt: skip
    try:
        wrapped = get_peft_model(model, lora)
    except ValueError as error:
        raise LolcatsError(f"finetune.targets {config.targets} do not fit this model: {error}") from None
    lora_too, maps = config.learning_rate > 0, config.feature_map_learning_rate > 0
    train_only(wrapped, lambda name: (lora_too and "lora_" in name) or (maps and ".lolcats." in name))
    if not any(p.requires_grad for p in wrapped.parameters()):
        raise LolcatsError(
            "finetune.learning_rate=0 leaves nothing to train, since this model has no feature maps. Set it, or skip "
            "stage 2 with finetune.max_steps=0."
        )
    if lora_too:
        _compute_in_input_dtype(wrapped)
    else:  # switching them off and on, as for the teacher, would make them trainable
        wrapped.base_model.disable_adapter_layers()
    return wrapped


def trained_layers(model: PreTrainedModel, config: FinetuneConfig) -> list[str]:
    """Full names of the layers that get LoRA: the targets, except those that ``protect_kept`` keeps as they are."""
    if not config.targets:
        raise LolcatsError(
            "finetune.targets is empty: name the layers to add LoRA to, or skip stage 2 with finetune.max_steps=0."
        )
    targets = lora_targets(model, config.targets)
    rows = kept_rows(model, kept_layers(model), targets) if config.protect_kept else {}
    trained = [name for name in targets if name not in rows or not rows[name].all()]
    if not trained:
        raise LolcatsError(
            f"finetune.protect_kept leaves nothing of finetune.targets {config.targets} to train, since all layers "
            "stay softmax attention. Set it to false, or add other targets."
        )
    return trained


def lora_targets(model: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """Full names of the layers that ``targets`` select.

    ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` select the attention layers with these roles, whatever the family
    calls them; a layer that computes q, k and v together has three roles. ``mlp`` selects the linear layers of
    the MLPs. Any other name selects the modules whose full name ends with it.
    """
    attentions = [name for name, module in model.named_modules() if hasattr(module, "lolcats")]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    inside = {name: set(name.removeprefix(a + ".").split(".")) for name in linear for a in attentions
              if name.startswith(a + ".")}  # fmt: skip
    found: dict[str, None] = {}
    for target in targets:
        called = {*PROJECTIONS.get(target, ()), *(FUSED if target in ("q_proj", "k_proj", "v_proj") else ())}
        layers = [name for name, parts in inside.items() if parts & called]
        if target == "mlp":
            stacks = tuple(f"{a.rsplit('.', 2)[0]}." for a in attentions)
            layers = [n for n in linear if n.startswith(stacks) and n not in inside and n.rpartition(".")[2] in MLP]
        elif not called:
            layers = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not layers:
            known = sorted({name.rpartition(".")[2] for name in inside})
            raise LolcatsError(
                f"finetune.targets {list(targets)} do not fit this model: it has no {target!r}. Linear layers of "
                f"its attention: {', '.join(known) or 'none'}."
            )
        found.update(dict.fromkeys(layers))
    return list(found)


def load_over_ranks(base: Base, config: Config, dtype: torch.dtype, device: torch.device) -> PeftModel:
    """Load the converted model with untrained LoRA, sharded across all ranks; each reads only its part of the weights.

    If the tensor names in the files differ from the model's (as in GGUF files), every rank first loads the whole model.
    """
    if config.finetune.use_dora:  # its magnitudes start as norms of weights, which are not loaded yet
        raise LolcatsError("finetune.use_dora does not work with a sharded base model: set finetune.sharding=never.")
    device, model = own_device(device), None
    if base.form != "gguf":
        trust = config.trust_remote_code
        model = empty_model(AutoConfig.from_pretrained(base.path, trust_remote_code=trust), dtype, trust)
        source = shards_of(base, model.base_model_prefix)
        try:
            source.check(dict(model.named_parameters()))
        except OtherNames:
            model = None
    torch.manual_seed(config.seed)
    if model is None:
        wrapped = add_lora(convert(load_model(base, dtype, trust=config.trust_remote_code), config), config.finetune)
        shard(wrapped.get_base_model(), device)
        return wrapped.to(device) if device.type == "cpu" else wrapped
    convert_empty(model, config.attention)
    torch.manual_seed(config.seed)
    with light_weights(model):
        wrapped = add_lora(model, config.finetune)
    shard(model, device)
    materialize(model, device, lambda name, p: fill_part(p, source, name.replace(".base_layer", "")))
    return wrapped.eval()


def load_lora(wrapped: PeftModel, directory: Path) -> None:
    """Load the LoRA matrices saved in ``directory`` into ``wrapped``."""
    path = directory / LORA_WEIGHTS
    ours = {n.replace(".default.", "."): p for n, p in wrapped.named_parameters() if "lora_" in n}
    load_strictly({name: p.detach() for name, p in ours.items()}, read_tensors(path), path)


class InputDtypeLinear(nn.Linear):
    """A linear layer that casts its fp32 weights to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def _compute_in_input_dtype(model: nn.Module) -> None:
    """Make LoRA compute in the dtype of its input, while its matrices stay fp32 for the optimizer.

    By default PEFT keeps an fp32 copy of each input for the backward pass. In a 16-bit model these copies are most of
    the memory of the attention layers.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.__class__ = InputDtypeLinear


class FinetuneTrainer(StageTrainer):
    """Loss: ``finetune.loss``, mean over all predicted tokens of an optimizer step, on all ranks, and in validation
    over those of all rows.

    Micro-batches hold different numbers of them: the last step of an epoch may end with fewer rows, documents that are
    kept apart (``data.reset_at_documents``) do not predict their first tokens, and ``data.loss`` leaves out prompts.
    """

    stage_config: FinetuneConfig

    @cached_property
    def graphs(self) -> PassGraphs:
        return PassGraphs()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """By the run's CUDA graph if it has one for this micro-batch."""
        inputs = self._prepare_inputs(inputs)
        graph = None
        if num_items_in_batch is not None:
            forget = self.forget_gradients if self._may_record(inputs) else None
            parts = self.current_gradient_accumulation_steps
            graph = self.graphs.find(self._pass, inputs, num_items_in_batch, parts, forget)
        if graph is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self.call = inputs_of(graph.batch["input_ids"])
        loss = graph(inputs, num_items_in_batch)
        self.watch.add(loss, self.where)
        return loss

    def _pass(self, inputs: dict[str, Tensor], count: Tensor) -> Tensor:
        return super().training_step(self.model, inputs, count)

    def _may_record(self, inputs: dict[str, Tensor]) -> bool:
        """Whether enough steps are left, most micro-batches are like this one, and no gradients would be lost."""
        left, args = self.state.max_steps - self.state.global_step, self.args
        shape = (self.current_gradient_accumulation_steps, len(inputs["input_ids"]))
        if shape != (args.gradient_accumulation_steps, args.per_device_train_batch_size):
            return False
        return left >= cuda_graph.WORTH and all(parameter.grad is None for parameter in self.trained)

    def forget_gradients(self) -> None:
        """A graph adds to gradients where they are."""
        if self.graphs.graph is None:
            super().forget_gradients()
        else:
            zero([parameter.grad for parameter in self.trained if parameter.grad is not None])

    @cached_property
    def lora(self) -> LeanLora:
        return LeanLora(self.base, self.base.dtype)

    def passing(self) -> AbstractContextManager[None]:
        return self.lora.cast()

    @cached_property
    def head(self) -> Head | None:
        return find_head(self.base)

    @property
    def base(self) -> PreTrainedModel:
        """The model that holds the LoRA matrices, without PEFT's wrapper."""
        wrapped: Any = self.model
        return wrapped.get_base_model()

    @property
    def distillation(self) -> Distillation | None:
        """What is learned from the teacher, if anything."""
        config = self.stage_config
        if config.loss == "cross_entropy":
            return None
        return Distillation(1.0 if config.loss == "kl" else config.kl_weight, config.kl_temperature)

    @cached_property
    def predicted(self) -> float:
        """Mean number of predicted tokens of a validation row."""
        rows: Any = self.eval_dataset
        return _predicted(self.data_collator([rows[number] for number in range(len(rows))])).item() / len(rows)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of an optimizer step, and how many tokens are predicted in them, on all ranks."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        count = torch.zeros((), device=self.args.device)
        for batch in samples:
            count += _predicted(batch).to(count.device)
        ranks().sum([count])
        return samples, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *_: Any, num_items_in_batch: Tensor | None = None, **__: Any
    ) -> Tensor:
        ids, positions, labels = inputs["input_ids"], inputs.get("position_ids"), inputs["labels"]
        self.call = inputs_of(ids, positions)
        if num_items_in_batch is None:  # the trainer takes the mean over rows later
            count = torch.full((), self.predicted * len(ids), device=ids.device)
        else:  # it takes the mean over ranks and micro-batches
            shares = ranks().size * self.current_gradient_accumulation_steps
            count = num_items_in_batch.clamp_min(1) / shares
        distillation = self.distillation
        if distillation is None and self.graphs.recording and is_frozen(self.head):
            distillation = Distillation(0.0)  # liger-kernel's cross-entropy waits for the GPU
        if distillation is not None:
            wrapped: Any = self.model
            loss = distillation_loss(wrapped, self.head, ids, distillation, positions, labels, count)
        else:
            loss = language_model_loss(
                self.base, self.head, ids, self.stage_config.liger, positions, labels, count
            )  # fmt: skip
        if torch.is_grad_enabled() and not self.graphs.recording:
            self.watch.add(loss, self.where)
        return loss

    def where(self, bad: Tensor) -> str:
        """Name what became NaN or infinite on the last batch: the first layer without LoRA, else the first LoRA matrix,
        else the first layer with LoRA."""
        layers = self.base.config.lolcats["layers"]
        modules = [self.base.get_submodule(entry["name"]) for entry in layers]
        wrapped: Any = self.model
        with wrapped.disable_adapter():
            number = first_bad_layer(self.base, modules, self.call)
        if number is None and (name := first_bad_weight(trainable(self.model))):
            return f", and so did {name}"
        number = first_bad_layer(self.base, modules, self.call) if number is None else number
        return "" if number is None else f" in layer {layers[number]['layer']}"

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; if feature maps are trained, they form a group with their own learning rate."""
        rate = self.stage_config.feature_map_learning_rate
        if self.optimizer is None and rate > 0:
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            lora: dict[str, Any] = {"params": [p for name, p in trained if ".lolcats." not in name]}
            maps: dict[str, Any] = {"params": [p for name, p in trained if ".lolcats." in name], "lr": rate}
            groups = [group for group in (lora, maps) if group["params"]]
            self.optimizer: Any = torch.optim.AdamW(
                groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
        return super().create_optimizer() if self.optimizer is None else self.optimizer


def _predicted(rows: Mapping[str, Tensor]) -> Tensor:
    """The number of tokens that rows (N, L) let a model predict."""
    return (next_tokens(rows["labels"], rows.get("position_ids")) >= 0).sum()
