"""Generate text from text with Hugging Face's ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from lolcats.errors import LolcatsError, first_line, out_of_memory
from lolcats.modeling.chat import is_unicode

Message = dict[str, str]


def plain_text(messages: list[Message]) -> str:
    """A conversation as plain text, for models without a chat template."""
    return "\n".join(message["content"] for message in messages)


def encode(tokenizer: Any, prompt: str | list[Message], raw: bool = False) -> Any:
    """Token ids of a prompt, in the tokenizer's chat template if it has one, else as plain text.

    raw: encode the text as is, without the chat template.
    """
    text = prompt if isinstance(prompt, str) else plain_text(prompt)
    if not is_unicode(text):
        raise LolcatsError("The prompt is not valid UTF-8.")
    if raw and not isinstance(prompt, str):
        raise LolcatsError("Messages cannot be encoded raw: give a text to complete.")
    if raw or not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # fmt: skip
    except Exception as error:  # a template is code from the model: it may raise anything, and so may Jinja's sandbox
        if out_of_memory(error):
            raise
        system = any(message["role"] == "system" for message in messages)
        advice = " It may not know system prompts: try without one." if system else ""
        raise LolcatsError(f"The model's chat template refuses these messages: {first_line(error)}.{advice}") from error


def generate(
    model: PreTrainedModel, tokenizer: Any, prompt: str | list[Message], max_new_tokens: int = 64,
    temperature: float = 0.0, top_p: float = 1.0, stream: bool = False, raw: bool = False, seed: int | None = None,
) -> str:  # fmt: skip
    """The model's answer. Temperature 0 is greedy; ``stream`` prints it as it comes; ``raw`` as in :func:`encode`;
    ``seed`` seeds PyTorch's generators."""
    inputs = encode(tokenizer, prompt, raw).to(model.device)
    if not inputs["input_ids"].numel():
        raise LolcatsError("The prompt has no tokens: give some text.")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        **sampling,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
