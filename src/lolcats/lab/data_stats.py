"""Data set statistics for ``lolcats data stats``: sizes, document lengths, effective sequence lengths, a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolcats.config import Config
from lolcats.data.inputs import Inputs
from lolcats.data.rows import Corpus, Data
from lolcats.errors import LolcatsError
from lolcats.evaluation.effective_length import QUANTILES, EffectiveLengths, effective_lengths
from lolcats.modeling.convert import convert
from lolcats.pipeline.rows import empty_share


@dataclass(frozen=True)
class Statistics:
    """``documents``: tokens per document; ``effective``: measured on a sample of training rows of ``length`` tokens."""

    facts: dict[str, Any]
    documents: Tensor
    effective: EffectiveLengths
    length: int

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table of distributions."""
        columns = {"tokens of a document": self.documents.float()}
        columns[f"effective length of a row of {self.length}"] = self.effective.rows
        columns["effective length of a head"] = _known(self.effective.heads)
        rows = [
            (name, *(f"{_quantile(values, share):,.1f}" for values in columns.values()))
            for name, share in QUANTILES.items()
        ]
        rows.insert(3, ("mean", *(f"{values.mean().item():,.1f}" for values in columns.values())))
        return ("", *columns), rows

    def draw(self, path: Path) -> None:
        """Draw histograms of the three distributions as a PNG."""
        if find_spec("matplotlib") is None:
            raise LolcatsError("The picture needs matplotlib: pip install 'lolcats[plots]'.")
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
        _histogram(axes[0], self.documents.float(), "Documents", "tokens")
        _histogram(axes[1], self.effective.rows, f"Rows of {self.length} tokens", "effective sequence length")
        _histogram(axes[2], _known(self.effective.heads), "Heads, over all rows", "effective sequence length")
        figure.savefig(path, dpi=100)
        pyplot.close(figure)


def data_statistics(model: str, source: str, config: Config, device: torch.device, dtype: torch.dtype,
                    count: int) -> Statistics:  # fmt: skip
    """Read ``source`` as a run would, and measure ``count`` evenly spaced training rows with the base model."""
    inputs = Inputs(model, trust=config.trust_remote_code)
    data, documents = inputs.data(source, config.data, config.seed), inputs.documents(source, config.data)
    attention = replace(config.attention, softmax_budget=0.0)  # only the teacher's attention is looked at
    converted = convert(inputs.model(dtype, device), replace(config, attention=attention))
    chosen = torch.linspace(0, len(data.train) - 1, min(count, len(data.train))).long().tolist()
    found = effective_lengths(converted, data.batches(chosen, config.transfer.rows_at_once))
    facts = {
        "documents": f"{len(documents):,}", "tokens": f"{int(documents.length.sum()):,}",
        "duplicate records dropped": f"{documents.counts['duplicate_records']:,}",
        "empty records": f"{documents.counts['empty_records']:,}",
        "broken lines skipped": f"{documents.counts['broken_lines_skipped']:,}",
        "unusable records skipped": f"{documents.counts['misfit_records_skipped']:,}", **_shares(documents),
        "training rows": f"{len(data.train):,} × {config.data.sequence_length}",
        "validation and test rows": f"{len(data.validation):,} and {len(data.test):,}",
        **_empty_terms(data, config),
        "rows measured": f"{len(chosen):,}", "layers measured": f"{len(found.layers)}",
    }  # fmt: skip
    return Statistics(facts, torch.from_numpy(documents.length), found, config.data.sequence_length)


def _empty_terms(data: Data, config: Config) -> dict[str, str]:
    """For hybrid attention, how many training tokens have nothing to learn from."""
    empty = empty_share(data, config)
    return {} if empty is None else {"training tokens with an empty linear term": f"{empty:.1%}"}


def _shares(documents: Corpus) -> dict[str, str]:
    """For a mixture, the tokens of each source."""
    if not documents.shares:
        return {}
    own = [int(documents.length[documents.which == n].sum()) for n in range(len(documents.stores))]
    names = [str(store.counts["source"]) for store in documents.stores]
    return {
        f"tokens of {Path(name).name}": f"{tokens:,} (share asked for: {share:.1%})"
        for name, tokens, share in zip(names, own, documents.shares, strict=True)
    }


def _known(values: Tensor) -> Tensor:
    return values[~values.isnan()]


def _quantile(values: Tensor, share: float) -> float:
    return float(np.quantile(values.numpy(), share))


def _histogram(axis: Any, values: Tensor, title: str, label: str) -> None:
    axis.hist(values.numpy(), bins=min(50, max(5, len(values) // 4)))
    axis.axvline(values.mean().item(), color="black", linestyle="--", label=f"mean {values.mean().item():,.1f}")
    axis.set(title=title, xlabel=label, ylabel="count")
    axis.grid(alpha=0.3)
    axis.legend()
