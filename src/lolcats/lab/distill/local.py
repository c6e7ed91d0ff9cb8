"""A teacher in this process: a model in our engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from lolcats.config import AttentionConfig
from lolcats.data.conversations import Misfit
from lolcats.data.tokens import encode, special_prefix
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Engine, SamplingParams, answer_all, check_model
from lolcats.lab.distill.prompts import Prompt, text_of
from lolcats.lab.distill.teacher import Answer, Numbered, Sampling
from lolcats.modeling.chat import ChatTemplate
from lolcats.modeling.convert import convert


class LocalTeacher:
    """A model in this process. A base model keeps all of its softmax attention.

    Decode steps have one batch size, so an answer is the same whatever is generated beside it, bit for bit.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, sampling: Sampling, slots: int) -> None:
        self.model = _runnable(model)
        self.tokenizer, self.sampling, self.slots = tokenizer, sampling, slots
        self.template, self.prefix = ChatTemplate(tokenizer), special_prefix(tokenizer)
        own = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int = own or 8192

    def answers(self, prompts: Sequence[Numbered]) -> Iterator[tuple[int, Answer]]:
        """
        Raises:
            LolcatsError: the engine cannot run the model, or failed.
        """
        requests: list[tuple[int, list[int]]] = []
        chats = {number for number, prompt in prompts if prompt.text is None}
        unusable: list[tuple[int, Answer]] = []
        for number, prompt in prompts:
            try:
                requests.append((number, self._tokens(prompt)))
            except Misfit as error:
                unusable.append((number, Answer(reason=str(error))))
        if requests:
            longest = max(len(tokens) for _, tokens in requests) + self.sampling.max_tokens
            engine = Engine(
                self.model, self.tokenizer, self.slots, batch_sizes=[self.slots], prefix_bytes=0,
                context=min(longest, self.context),
            )  # fmt: skip
            try:
                asked = [(*request, self._params(request[0])) for request in requests]
                for found in answer_all(engine, asked, anew=chats):
                    yield found.number, Answer(found.text, found.cut, found.prompt_tokens, len(found.tokens))
            finally:
                engine.close()
        yield from unusable

    def _tokens(self, prompt: Prompt) -> list[int]:
        if prompt.text is None:
            tokens = encode(self.tokenizer, text_of(prompt, self.template))
        else:
            tokens = self.prefix + encode(self.tokenizer, prompt.text)
        if not tokens:
            raise Misfit("it has no tokens")
        if len(tokens) + self.sampling.max_tokens > self.context:
            raise Misfit(f"prompt and --max-tokens exceed the model's context of {self.context} tokens")
        return tokens

    def _params(self, number: int) -> SamplingParams:
        asked = self.sampling
        return SamplingParams(asked.max_tokens, asked.temperature, top_p=asked.top_p, seed=asked.seed_of(number))


def _runnable(model: PreTrainedModel) -> PreTrainedModel:
    """The model as the engine runs it: a base model with all of its attention kept.

    Raises:
        LolcatsError: the engine cannot run it.
    """
    try:
        model = model if hasattr(model.config, "lolcats") else convert(model, AttentionConfig(kind="softmax"))
        check_model(model)
    except LolcatsError as error:
        raise LolcatsError(f"{error} To use it as a teacher, serve it with another engine and pass --server.") from None
    return model
