"""The models of a run, made from its base model and the artefacts in its directory; one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lolcats.config import Config
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, attach_lora, load_feature_maps, merge_lora
from lolcats.modeling.classes import convert_as
from lolcats.modeling.convert import convert
from lolcats.modeling.record import read_record
from lolcats.modeling.skeleton import Skeleton, build_skeleton
from lolcats.pipeline.heads import only_in_4_bits, with_run_heads
from lolcats.ranks import ranks
from lolcats.run import Run
from lolcats.stages.distributed import is_sharded
from lolcats.stages.finetune.fits import shards
from lolcats.stages.finetune.stage import load_lora, load_over_ranks
from lolcats.weights.base import load_quantized

Say = Callable[[str], None]


def device_and_dtype(config: Config) -> tuple[torch.device, torch.dtype]:
    """The configured device and dtype, with ``auto`` resolved for this machine."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device != "cpu" and not getattr(torch, device).is_available():
        raise LolcatsError(f"device: {device} is not available on this machine.")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return torch.device(device), getattr(torch, dtype)


@dataclass
class Models:
    """Asking for one model replaces another, unless it is the same one.

    With ``finetune.quantize_base``, a base model that does not fit otherwise is in 4 bits not only in stage 2, and LoRA
    stays beside its weights. Under torchrun, a base model that does not fit on each rank is sharded for stage 2, and
    LoRA stays beside its weights, too.

    as_trained: leave the student of a stage 2 in 4 bits on such a base model, as ``--quantize nf4`` loads it; otherwise
    its LoRA is merged into the base model's own weights.
    """

    run: Run
    inputs: Inputs
    say: Say
    as_trained: bool = False
    _model: PreTrainedModel | None = field(default=None, init=False)
    _skeleton: Skeleton | None = field(default=None, init=False)
    _wrapped: PeftModel | None = field(default=None, init=False)  # the PEFT model around a sharded ``_model``
    _has_lora: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.config = with_run_heads(self.run)
        self.device, self.dtype = device_and_dtype(self.config)

    @cached_property
    def in_4_bits(self) -> bool:
        """Whether the base model is in 4 bits not only for stage 2."""
        return only_in_4_bits(self.config, self.inputs, self.device, self.dtype)

    @property
    def student_in_4_bits(self) -> bool:
        """Whether the trained model stays on a base model in 4 bits."""
        trained = (self.run.directory / LORA).is_dir()
        return trained and self.config.finetune.quantize_base != "none" and (self.as_trained or self.in_4_bits)

    def skeleton(self) -> Skeleton:
        """The converted model without weights, for a stage 1 that loads one layer after another."""
        if self._skeleton is None:
            self._announce("Reading", " layer by layer")
            attention, seed = self.config.attention, self.config.seed
            self._skeleton = build_skeleton(
                self.inputs.base, attention, self.dtype, self.device, seed, self.inputs.trust
            )  # fmt: skip
        return self._skeleton

    def converted(self) -> PreTrainedModel:
        """The converted model without LoRA, with the feature maps of stage 1 if it is done, else untrained ones."""
        if self._model is None or self._has_lora:
            self.drop()
            done = self.run.stage_done("transfer")
            if self.in_4_bits:
                self._announce("Loading", " in 4 bits")
                self._converted(load_quantized(self.inputs.base, self.dtype, self.device, self.inputs.trust))
            elif done and shards(self.inputs.base, self.config, self.device, self.dtype):
                self._announce("Loading", f" over {ranks().size} ranks")
                self._wrapped = load_over_ranks(self.inputs.base, self.config, self.dtype, self.device)
                self._model = self._wrapped.get_base_model()
            else:
                self._announce("Loading")
                self._converted(self.inputs.model(self.dtype, self.device))
            assert self._model is not None
            if done:
                load_feature_maps(self._model, self.run.directory / FEATURE_MAPS)
        return self._model

    def _converted(self, base_model: PreTrainedModel) -> None:
        torch.manual_seed(self.config.seed)
        self._model = convert(base_model, self.config)

    def student(self) -> PreTrainedModel:
        """The trained model, once stage 2 is done: with its LoRA merged, or beside sharded weights."""
        if not self._has_lora:
            lora = self.run.directory / LORA
            quantized = self.student_in_4_bits
            model = self._quantized() if quantized else self.converted()
            if lora.is_dir() and self._wrapped is not None:
                load_lora(self._wrapped, lora)
            elif lora.is_dir():
                self._model = (attach_lora if quantized else merge_lora)(model, lora)
            self._has_lora = True
        assert self._model is not None
        return self._model

    def for_finetuning(self) -> tuple[PreTrainedModel | PeftModel, bool]:
        """What stage 2 trains, and whether it is still to be sharded."""
        if self.config.finetune.quantize_base != "none":
            return self._quantized(), False
        model = self.converted()
        if self._wrapped is not None:
            return self._wrapped, False
        return model, shards(self.inputs.base, self.config, self.device, self.dtype)

    def trained(self, wrapped: PeftModel) -> None:
        """Take over the model that stage 2 trained."""
        if is_sharded(wrapped):  # LoRA is not merged into sharded weights
            self._model, self._wrapped, self._has_lora = wrapped.get_base_model().eval(), wrapped, True
        elif self.in_4_bits:
            self._model, self._has_lora = wrapped.get_base_model().eval(), True
        elif self.config.finetune.quantize_base != "none":
            self.drop()
        else:
            self._model, self._has_lora = wrapped.merge_and_unload().eval(), True

    def drop(self) -> None:
        """Hold nothing in memory."""
        self._model = self._skeleton = self._wrapped = None
        self._has_lora = False

    def _quantized(self) -> PreTrainedModel:
        """The converted model on a base in 4 bits. A second model in memory would undo the saving."""
        if self.in_4_bits:
            return self.converted()
        self.drop()
        base_model = load_quantized(self.inputs.base, self.dtype, self.device, self.inputs.trust)
        self._model = convert_as(base_model, read_record(self.run.directory))
        load_feature_maps(self._model, self.run.directory / FEATURE_MAPS)
        return self._model

    def _announce(self, verb: str, how: str = "") -> None:
        text = f"{verb} {self.inputs.base.path}{how} ({self.dtype}, {self.device})"
        self.say(text.replace("torch.", ""))
