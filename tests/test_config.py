"""Recipes, overrides, and invalid configurations."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from lolcats.config import (
    REMOVED,
    AttentionConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    TransferConfig,
    from_dict,
    identity_of,
    load_config,
    recipe_names,
    to_dict,
    to_yaml,
)
from lolcats.errors import LolcatsError
from lolcats.ranges import RANGES


def test_shipped_recipes() -> None:
    assert recipe_names() == [
        "default",
        "long",
        "paper",
        "paper-405b",
        "paper-70b",
        "paper-sinks",
        "small",
        "untrained",
    ]
    for name in recipe_names():
        config = load_config(name)
        assert from_dict(Config, yaml.safe_load(to_yaml(config))) == config
        text = to_yaml(config)
        assert "/" not in text, "no path and no model name in a recipe"
        assert config.transfer.weight_decay == 0
        assert config.transfer.max_grad_norm == 1


def test_recipes_of_the_papers_large_models() -> None:
    small, medium, large = (load_config(name) for name in ("paper", "paper-70b", "paper-405b"))
    assert small.attention == medium.attention == large.attention
    assert medium.transfer.max_steps * medium.transfer.batch_size * medium.data.sequence_length == 20_480_000
    assert (medium.transfer.xent_weight, large.transfer.mse_weight, large.transfer.xent_weight) == (0, 1000, 1)
    assert (large.transfer.order, large.transfer.block_size) == ("blocks", 9)
    assert (medium.finetune.rank, large.finetune.rank, large.finetune.dropout) == (8, 4, 0.05)
    assert large.finetune.batch_size % 24 == 0  # three nodes of eight


def test_paper_recipe_is_the_papers_table_8() -> None:
    config = load_config("paper")
    a, t, f = config.attention, config.transfer, config.finetune
    assert (a.kind, a.feature_map, a.feature_dim, a.window, a.window_size) == ("hybrid", "hedgehog", 64, "terraced", 64)
    assert (a.sinks, a.key_maps) == (0, "per_query_head")
    assert (t.learning_rate, t.batch_size, t.epochs, t.schedule) == (1e-2, 8, 2, "reduce_on_plateau")
    assert (t.plateau_factor, t.plateau_patience, t.min_learning_rate, t.eval_steps) == (0.1, 10, 1e-5, 100)
    assert (t.mse_weight, t.xent_weight, config.data.sequence_length) == (1000, 0, 1024)
    assert (f.learning_rate, f.rank, f.alpha, f.dropout, f.epochs) == (1e-4, 8, 16, 0, 2)
    assert f.targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert load_config("paper-sinks").attention.sinks == 4


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "1e400"])
def test_every_number_is_finite(value: str) -> None:
    numbers = [
        f"{section}.{name}" for section, fields in to_dict(Config()).items() if isinstance(fields, dict)
        for name, default in fields.items() if isinstance(default, float)
    ]  # fmt: skip
    assert len(numbers) > 15
    for name in numbers:
        with pytest.raises(LolcatsError, match=f"{name}: expected a finite number"):
            load_config("paper-sinks", [f"{name}={value}"])


def test_overrides_and_types(tmp_path: Path) -> None:
    config = load_config("small", ["transfer.learning_rate=1e-3", "attention.layers={'7': softmax}", "seed=3"])
    assert config.transfer.learning_rate == 1e-3
    assert config.attention.layers == {"7": "softmax"}
    assert config.seed == 3
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("attention: {window: sliding}\ntransfer: {learning_rate: 1e-2, max_steps: 5}\n")
    config = load_config(str(recipe), ["attention.sinks=0"])
    assert (config.attention.window, config.attention.sinks, config.transfer.max_steps) == ("sliding", 0, 5)
    assert to_dict(config)["transfer"]["learning_rate"] == 0.01


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention.windw=3", "Did you mean attention.window"),
        ("nonsense=1", "Unknown configuration key nonsense"),
        ("attention.window=round", "expected one of terraced, sliding"),
        ("attention.window_size=big", "attention.window_size: expected int"),
        ("attention.window_size=0", "at least 1"),
        ("attention.sinks=65", "must not exceed"),
        ("transfer.micro_batch_size=3", "multiple"),
        ("transfer.learning_rate=0", "must be positive"),
        ("data.sequence_length=100", "below two windows"),
        ("finetune.targets=q_proj", "expected list"),
        ("data.skip_broken=1", "expected bool"),
        ("attention=3", "expected a mapping"),
        ("seed.x=3", "expected int"),
        ("transfer.learning_rate=nan", "transfer.learning_rate: expected a finite number, got nan"),
        ("transfer.learning_rate=1e999", "expected a finite number"),
        (f"transfer.learning_rate=1{'0' * 400}", "expected a finite number"),
        ("finetune.alpha=.inf", "finetune.alpha: expected a finite number, got inf"),
        ("transfer.learning_rate", "expected KEY=VALUE"),
        ("transfer.learning_rate=[", "not valid YAML"),
    ],
)
def test_bad_overrides_name_the_key(override: str, message: str) -> None:
    with pytest.raises(LolcatsError, match=message):
        load_config("paper-sinks", [override])


OUT_OF_RANGE = [
    ("transfer.epochs=0", "transfer.epochs must be positive, not 0. To skip stage 1, set transfer.max_steps=0."),
    ("finetune.epochs=0", "finetune.epochs must be positive, not 0. To skip stage 2, set finetune.max_steps=0."),
    ("transfer.epochs=-1", "must be positive, not -1"),
    ("transfer.plateau_factor=1", "transfer.plateau_factor must be at least 0 and less than 1, not 1."),
    ("transfer.plateau_factor=-0.1", "must be at least 0 and less than 1, not -0.1"),
    ("finetune.dropout=1.5", "finetune.dropout must be at least 0 and less than 1, not 1.5."),
    ("finetune.dropout=-0.1", "finetune.dropout must be at least 0"),
    ("finetune.alpha=0", "finetune.alpha must be positive"),
    ("finetune.rank=0", "finetune.rank must be at least 1"),
    ("finetune.kl_weight=1", "finetune.kl_weight must be strictly between 0 and 1, not 1."),
    ("finetune.feature_map_learning_rate=-1", "must be at least 0, not -1"),
    ("transfer.weight_decay=-0.1", "transfer.weight_decay must be at least 0"),
    ("finetune.max_grad_norm=-1", "finetune.max_grad_norm must be at least 0"),
    ("finetune.min_learning_rate=-1", "finetune.min_learning_rate must be at least 0"),
    ("transfer.mse_weight=-1", "transfer.mse_weight must be at least 0"),
    ("transfer.xent_weight=-1", "transfer.xent_weight must be at least 0"),
    ("transfer.mse_weight=0", "transfer.mse_weight and transfer.xent_weight are both 0"),
    ("transfer.max_steps=-2", "transfer.max_steps must be at least -1"),
    ("data.keep_longest_effective=0", "must be greater than 0 and at most 1, not 0."),
    ("seed=-1", "seed must be between 0 and 4294967295, not -1."),
    ("seed=4294967296", "seed must be between 0 and 4294967295, not 4294967296."),
    ("seed=100000000000000000000000", "seed must be between 0 and"),
]


@pytest.mark.parametrize(("override", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range_name_the_setting_and_its_range(override: str, message: str) -> None:
    with pytest.raises(LolcatsError, match=re.escape(message)):
        load_config("paper-sinks", [override])


def test_every_number_has_a_range() -> None:
    sections = {"" if name == "seed" else name: value for name, value in to_dict(Config()).items()}
    numbers = {
        (section, name) for section, fields in sections.items()
        for name, default in (fields if isinstance(fields, dict) else {"seed": fields}).items()
        if isinstance(default, int | float) and not isinstance(default, bool)
    }  # fmt: skip
    assert len(numbers) > 45
    known = {(section, name) for section, ranges in RANGES.items() for name in ranges}
    assert numbers == known | {("transfer", "epochs"), ("finetune", "epochs")}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite_without_a_file(value: float) -> None:
    for make in (lambda: AttentionConfig(gate_init=value), lambda: FinetuneConfig(alpha=value),
                 lambda: TransferConfig(epochs=value), lambda: DataConfig(keep_longest_effective=value)):  # fmt: skip
        with pytest.raises(LolcatsError, match="expected a finite number"):
            make()


def test_a_stage_that_is_skipped_or_counted_in_steps_needs_no_epochs() -> None:
    for steps in (0, 5):
        config = load_config("paper-sinks", [f"transfer.max_steps={steps}", "transfer.epochs=0"])
        assert config.transfer.epochs == 0


@pytest.mark.parametrize("overrides", [
    ["transfer.max_steps=0", "transfer.mse_weight=0"], ["attention.kind=window", "transfer.mse_weight=0"],
    ["transfer.schedule=cosine", "transfer.plateau_factor=1"], ["attention.gate_init=-100"],
])  # fmt: skip
def test_a_setting_without_effect_has_no_range(overrides: list[str]) -> None:
    load_config("paper-sinks", overrides)


def test_layers_may_be_numbers() -> None:
    named = AttentionConfig(softmax_heads={"3": [0]}, layers={"1": "softmax"})
    assert AttentionConfig(softmax_heads={3: [0]}, layers={1: "softmax"}) == named  # type: ignore[dict-item]


def test_unknown_recipe() -> None:
    with pytest.raises(LolcatsError, match="Unknown recipe"):
        load_config("no_such_recipe")


@pytest.mark.parametrize(("setting", "neutral"), REMOVED.items())
def test_removed_settings_are_read_if_they_change_nothing(setting: tuple[str, str], neutral: object, tmp_path) -> None:
    section, name = setting
    config = load_config("small")
    old = to_dict(config)
    old[section][name] = neutral
    assert from_dict(Config, old) == config
    assert identity_of(config)[section][name] == neutral
    assert name not in to_dict(config)[section]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert load_config(str(tmp_path / "config.yaml"), [f"{section}.{name}={neutral}"]) == config
    with pytest.raises(LolcatsError, match=rf"{section}\.{name} was removed in this version: .*be {neutral}.*not 0\.5"):
        load_config("small", [f"{section}.{name}=0.5"])


def test_listed_heads_replace_those_that_a_recipe_would_choose() -> None:
    for change in ("attention.softmax_heads={1: [0]}", "attention.softmax_heads.1=[0]"):
        attention = load_config("default", [change]).attention
        assert (attention.softmax_heads, attention.softmax_budget) == ({"1": [0]}, 0)
    assert load_config("default").attention.softmax_budget == 0.125
    with pytest.raises(LolcatsError, match="set one of the two"):
        load_config("default", ["attention.softmax_heads={1: [0]}", "attention.softmax_budget=0.5"])
