"""Whether a run's rows fit its attention: rows that never reach the linear term, splits that are smaller than asked."""

from __future__ import annotations

from collections.abc import Iterator

from lolcats.config import Config
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import layer_spec
from lolcats.report.table import empty_term
from lolcats.weights.base import Base, read_config


def linear_from(config: Config) -> int | None:
    """The first position whose query has keys for the linear term of hybrid layers; None without such layers."""
    attention = config.attention
    kinds = (attention.kind, *attention.layers.values())
    return layer_spec(attention, "hybrid").linear_from if "hybrid" in kinds else None


def positions_of(base: Base, trust: bool) -> int | None:
    """How many positions the base model has, if its configuration says so."""
    return getattr(read_config(base, trust).get_text_config(), "max_position_embeddings", None)


def check_positions(config: Config, base: Base, trust: bool) -> None:
    """Refuse rows that are longer than the positions of the base model: those beyond mean nothing to it."""
    most = positions_of(base, trust)
    if most and config.data.sequence_length > most:
        raise LolcatsError(
            f"data.sequence_length is {config.data.sequence_length}, and this model has only {most} positions: use "
            f"--set data.sequence_length={most}, or less."
        )


def check_rows(config: Config) -> None:
    """Refuse rows that end before the linear term of hybrid layers begins."""
    first, length = linear_from(config), config.data.sequence_length
    if first is not None and length <= first:
        raise LolcatsError(
            f"data.sequence_length ({length}) is too short for attention.window_size ({config.attention.window_size}): "
            f"sinks and window cover the first {first} tokens of a row, so the linear term would never be trained. Use "
            "longer rows or a smaller window."
        )


def empty_share(data: Data, config: Config) -> float | None:
    """Share of the training tokens whose query has no key for the linear term; None without hybrid layers."""
    first = linear_from(config)
    return None if first is None else data.share_before(first)


def check_documents(empty: float | None, config: Config) -> None:
    """Refuse documents that are kept apart if each ends before the linear term of hybrid layers begins."""
    if empty == 1:
        raise LolcatsError(
            "With data.reset_at_documents, no document is long enough for the linear term: sinks and window cover the "
            f"first {linear_from(config)} tokens of each. Use longer documents, a smaller attention.window_size, or "
            "data.reset_at_documents=false."
        )


def notes(data: Data, config: Config, empty: float | None) -> Iterator[str]:
    """What a user should know of the rows before they are trained on. ``empty``: :func:`empty_share` of documents that
    are kept apart."""
    summary = data.summary
    skipped = [(summary["broken_lines_skipped"], "broken"), (summary["misfit_records_skipped"], "unusable")]
    if found := [f"{count:,} {what}" for count, what in skipped if count]:
        yield f"skipped records: {', '.join(found)}"
    train, validation, test = (summary[f"{name}_rows"] for name in ("train", "validation", "test"))
    if validation < config.data.validation_rows or test < config.data.test_rows:
        yield (
            f"little data: {validation} validation and {test} test rows are held out instead of "
            f"{config.data.validation_rows} and {config.data.test_rows}, and {train} are left to train on"
        )
    if data.labels:
        share = (data.labels["validation"] >= 0).double().mean().item()
        yield f"data.loss=completion: {share:.0%} of the tokens of the validation rows are answers"
    if empty is not None:
        yield empty_term(empty)
