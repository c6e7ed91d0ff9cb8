"""What a linearized model's mask function returns in place of a mask."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lolcats.attention import Documents
from lolcats.errors import LolcatsError
from lolcats.modeling.call import Call, current, require

NOT_APART = (
    "This model's family does not separate documents that are packed into one row (position_ids that restart). "
    "Give each document its own row."
)


class MaskRequest:
    """The mask that the family asked for, kept until a layer needs it.

    Linearized layers read ``call`` and ``padding``; kept softmax layers and the teacher build the family's own mask,
    once. ``rotation``: RoPE's cos and sin (B or 1, T, channels), if the layer that reads the mask needs them.
    """

    def __init__(self, arguments: dict[str, Any], call: Call) -> None:
        self.arguments, self.call = arguments, call
        self.rotation: Any = None
        self._built: dict[str, Any] = {}
        self._causal = False
        stop = int(arguments["kv_length"]) + int(arguments.get("kv_offset", 0))
        self.padding = call.padding(arguments.get("attention_mask"), stop - int(arguments["q_length"]), stop)
        if call.documents is not None:
            self._check_documents(call.documents)

    def with_rotation(self, rotation: Any) -> MaskRequest:
        """The same request for a layer that also needs RoPE's cos and sin."""
        mask = copy.copy(self)
        mask.rotation = rotation
        return mask

    def verify(self) -> None:
        """Raise unless the mask is causal, apart from padding and a window: anything else would be ignored here.

        Bidirectional blocks of image tokens, prefixes and the like are known only during the call.
        """
        if self.call.documents is not None or self.arguments.get("allow_is_causal_skip", True) or self._causal:
            return  # documents of a packed row are separated
        mask = self.build("sdpa")
        if mask is None:
            return
        length, total = mask.shape[-2:]
        causal = torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
        keys = self.arguments.get("attention_mask")
        expected = causal if keys is None else causal & keys[:, None, None, -total:].bool()
        queries = True if self.padding.mask is None else self.padding.mask[:, None, :, None]
        wrong = mask & ~causal if self.arguments.get("local_size") else mask ^ expected
        require(
            ~(wrong & queries),
            "This call needs attention that is not causal (bidirectional image tokens, a prefix), which a linearized "
            "layer cannot compute.",
        )
        self._causal = True

    def build(self, implementation: str) -> Any:
        """The mask that ``implementation`` (``sdpa``, ``eager``, ...) would have been given."""
        if implementation not in self._built:
            self._built[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
        return self._built[implementation]

    def _check_documents(self, documents: Documents) -> None:
        """Raise LolcatsError unless the family's own mask separates the first two documents of a packed row."""
        row, first = next((row, lengths[0]) for row, lengths in enumerate(documents.lengths) if len(lengths) > 1)
        place = [torch.tensor(x, device=documents.device) for x in (row, 0, first, first - 1)]
        if bool(self.arguments["mask_function"](*place)):
            raise LolcatsError(NOT_APART)

    def __getitem__(self, index: Any) -> SlicedMask:
        return SlicedMask(self, index)


class SlicedMask(MaskRequest):
    """The mask for some queries: Gemma 4 drops the others before its last layers, which share keys and stay softmax."""

    def __init__(self, whole: MaskRequest, index: Any) -> None:
        super().__init__({**whole.arguments, "allow_is_causal_skip": False}, whole.call)
        self.index = index

    def build(self, implementation: str) -> Any:
        return super().build(implementation)[self.index]

    def verify(self) -> None:
        raise LolcatsError(
            "This model skips some tokens before a linearized layer, but linear attention needs every token. Keep that "
            "layer as softmax attention (attention.layers)."
        )


def mask_function(**arguments: Any) -> MaskRequest:
    return MaskRequest(arguments, current() or Call())


def check_apart(mask: Any) -> None:
    """Raise LolcatsError if rows hold several documents and the family asked for no mask that separates them."""
    if mask is not None:
        return
    call = current()
    if call is not None and call.documents is not None:
        raise LolcatsError(NOT_APART)


def request_of(mask: Any) -> MaskRequest | None:
    """The request that a layer was given as its mask; None if the family asks for no mask.

    Raises:
        LolcatsError: for any other mask.
    """
    if mask is None:
        check_apart(mask)
        return None
    if isinstance(mask, MaskRequest):
        mask.verify()
        return mask
    raise LolcatsError(
        "A linearized model takes a 2-D attention mask (batch, tokens) with 0 for padding; "
        f"custom masks are not supported (got shape {tuple(mask.shape)})."
    )
