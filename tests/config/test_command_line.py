"""The configuration through its public surface: flags, recipes, messages, and the way back to YAML."""

from __future__ import annotations

import ast
import dataclasses
import gc
import json
import logging
import re
import shlex
from typing import ClassVar

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings, strategies as st

from ham_hf.commands import compare, evaluate, page, push, train
from ham_hf.config import (
    AttackConfig,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    EvaluationConfig,
    HubConfig,
    LearningRateDrop,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
    config_to_dict,
    config_to_yaml,
    load_train_config,
    parse_calibrate_config,
    parse_evaluate_config,
    parse_train_config,
)
from ham_hf.config.yaml_file import setting_words
from ham_hf.methods import HAM, PGDAT, Method, available
from ham_hf.settings import SettingsGroup
from tests.support.tables import cases


def groups_of(config: TrainConfig) -> list[SettingsGroup]:
    return [getattr(config, name) for name in ("data", "model", "attack", "training", "evaluation", "hub")]


@pytest.fixture
def recipe(tmp_path):
    """Write YAML text to a file and return its path."""

    def write(text: str, name: str = "recipe.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message_of_exit(argv, capsys, parse=parse_train_config, status=2) -> str:
    with pytest.raises(SystemExit) as caught:
        parse([str(word) for word in argv])
    captured = capsys.readouterr()
    assert caught.value.code == status
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.endswith("\n")
    return captured.err


VALUES = cases(__file__, "values.yaml")

# ----------------------------------------------------------------------------------------------- defaults and flags


def test_defaults_are_the_documented_ones():
    config = parse_train_config([])
    assert config == TrainConfig()
    assert config.data.dataset_name == "digits"
    assert (config.attack.norm, config.attack.epsilon, config.attack.step_size) == ("linf", 8 / 255, 2 / 255)
    assert config.method == HAM()
    assert config.training.lr_drops == ((60, 0.1), (90, 0.01), (110, 0.005))


@pytest.mark.parametrize(("argv", "group", "name", "value"), VALUES["flags"])
def test_flags(argv, group, name, value):
    found, value = getattr(getattr(parse_train_config(argv.split()), group), name), ast.literal_eval(value)
    assert found == value
    assert type(found) is type(value) or isinstance(found, tuple)


def test_values_of_model_args_are_yaml():
    words = "in_chans=1 layers=[1,1,1,1] drop_rate=1e-1 act_layer=gelu norm=null aa='no' pos=no flag=true code=010"
    args = parse_train_config(["--model_args", *words.split()]).model.model_args
    assert args == {
        "in_chans": 1,
        "layers": [1, 1, 1, 1],
        "drop_rate": 0.1,
        "act_layer": "gelu",
        "norm": None,
        "aa": "no",
        "pos": "no",
        "flag": True,
        "code": 10,
    }
    assert type(args["in_chans"]) is int
    assert args["flag"] is True


# --------------------------------------------------------------------------------------------------------- recipes


def test_flags_win_over_the_recipe_and_the_rest_stays(recipe):
    path = recipe("epsilon: 4/255\nnum_steps: 7\nlearning_rate: 1e-3\nskip_corrupt: yes\n")
    config = parse_train_config(["--config", str(path), "--num_steps", "5", "--no_skip_corrupt"])
    assert (config.attack.epsilon, config.attack.num_steps) == (4 / 255, 5)
    assert config.training.learning_rate == 1e-3
    assert config.data.skip_corrupt is False


@pytest.mark.parametrize(("text", "group", "name", "value"), VALUES["yaml"])
def test_yaml_is_read_by_the_type_of_the_setting(recipe, text, group, name, value):
    found, value = getattr(getattr(load_train_config(recipe(text)), group), name), ast.literal_eval(value)
    assert found == value
    assert type(found) is type(value) or isinstance(found, tuple)


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("\ufeffseed: 3\r\nnum_steps: 4\r\n".encode())
    config = load_train_config(path)
    assert (config.training.seed, config.attack.num_steps) == (3, 4)


@pytest.mark.parametrize(
    ("argv", "used"),
    [([], True), (["--seed", "1"], True), (["--dataset_name", "digits"], False), (["--dataset-name=x/y"], False)],
)
def test_default_recipe_is_used_when_neither_recipe_nor_dataset_is_named(recipe, argv, used, caplog):
    path = recipe("num_steps: 6\n")
    with caplog.at_level(logging.INFO, logger="ham_hf"):
        config = parse_train_config(argv, default_recipe=path)
    assert (config.attack.num_steps == 6) is used
    assert any(str(path) in record.getMessage() for record in caplog.records) is used


def test_a_named_recipe_replaces_the_default_recipe(recipe):
    other = recipe("seed: 5\n", "other.yaml")
    config = parse_train_config(["--config", str(other)], default_recipe=recipe("num_steps: 6\n"))
    assert (config.training.seed, config.attack.num_steps) == (5, 10)


def test_another_method_on_the_command_line_drops_the_options_of_the_recipes_method(recipe, caplog):
    path = recipe("method: ham\nmining_step: 4\nmining_start_epoch: 0\nnum_steps: 7\n")
    with caplog.at_level(logging.INFO, logger="ham_hf"):
        config = parse_train_config(["--config", str(path), "--method", "pgd_at"])
    assert config.method == PGDAT()
    assert config.attack.num_steps == 7
    (said,) = [record.getMessage() for record in caplog.records]
    assert "mining_step, mining_start_epoch" in said


def test_an_option_of_the_recipes_method_still_wins_when_the_method_is_repeated(recipe):
    path = recipe("method: ham\nmining_step: 4\n")
    assert parse_train_config(["--config", str(path), "--method", "ham"]).method == HAM(mining_step=4)


def test_a_class_weight_draws_no_classes_and_so_can_stream():
    words = ["--dataset_name", "me/x", "--dataset_streaming"]
    parse_train_config([*words, "--method", "cfol", "--cfol_as", "weight"])
    parse_train_config([*words, "--method", "pgd_at", "--class_weighting", "cfol"])


def test_an_attack_that_cannot_cross_the_ball_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="ham_hf"):
        parse_train_config(["--num_steps", "4", "--mining_start_epoch", "1"])
        assert caplog.text == ""
        parse_train_config(["--num_steps", "3", "--mining_step", "1", "--mining_start_epoch", "1"])
    assert "--num_steps 3 of --step_size 0.007843 reach 0.02353, less than --epsilon 0.03137" in caplog.text


def test_a_run_that_ends_before_the_method_starts_is_told_so(caplog):
    with caplog.at_level(logging.WARNING, logger="ham_hf"):
        parse_train_config(["--num_train_epochs", "50"])
        said = "ham starts at epoch 51 (--mining_start_epoch 50), and the run has 50 epochs: it will never be active"
        assert said in caplog.text
        caplog.clear()
        borrowed = ["--mining_start_epoch", "1", "--class_weighting", "dafa", "--awp_gamma", "0.01"]
        parse_train_config([*borrowed, "--num_train_epochs", "20", "--awp_start_epoch", "30"])
        assert [record.args[:2] for record in caplog.records] == [
            ("dafa", "epoch 71 (--class_rule_args dafa_start_epoch=70)"),
            ("awp", "epoch 31 (--awp_start_epoch 30)"),
        ]
        caplog.clear()
        parse_train_config(["--num_train_epochs", "51"])
        assert caplog.text == ""


# ------------------------------------------------------------------------------------------------------- bad input

BAD = cases(__file__, "bad_command_lines.yaml")
READERS = {
    "train": parse_train_config,
    "evaluate": parse_evaluate_config,
    "calibrate": parse_calibrate_config,
    "training": train.main,
    "evaluation": evaluate.main,
    "push": push.main,
    "compare": compare.main,
    "page": page.main,
}


@pytest.mark.parametrize("row", BAD["command_lines"], ids=lambda row: f"{row[0]} {row[2]}")
def test_bad_command_lines_end_with_a_status_say_why_and_leave_nothing(row, tmp_path, monkeypatch, capsys):
    command, status, flags, *fragments = row
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "report.json").write_text("{}")
    words = shlex.split(flags.replace("{tmp}", str(tmp_path)).replace("{long}", 94 * "x"))
    message = message_of_exit(words, capsys, READERS[command], status=status)
    assert "error: " in message
    for fragment in fragments:
        assert fragment in message
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "report.json"]


@pytest.mark.parametrize("row", BAD["recipes"], ids=lambda row: row[0][:40])
def test_bad_recipes_name_file_line_and_reason(recipe, row, capsys):
    text, *fragments = row
    path = recipe(text)
    message = message_of_exit(["--config", path], capsys)
    for fragment in fragments:
        assert fragment in message
    with pytest.raises(ConfigError):
        load_train_config(path)


def test_a_recipe_in_another_encoding_is_refused(tmp_path, capsys):
    (tmp_path / "latin1.yaml").write_bytes(b"output_dir: caf\xe9\n")
    assert "UTF-8" in message_of_exit(["--config", tmp_path / "latin1.yaml"], capsys)


def test_everything_that_is_wrong_is_listed_at_once(recipe, capsys):
    path = recipe("epsilon: big\nunheard_of: 1\n")
    message = message_of_exit(["--config", path, "--num_steps", "0", "--lr", "1", "--method", "pgd_at"], capsys)
    assert "4 problems" in message
    assert message.count("\n  - ") == 4
    for fragment in ("--epsilon big", "unheard_of", "--num_steps 0", "'lr'"):
        assert fragment in message


def test_a_name_like_no_setting_gets_no_suggestion(capsys):
    for word in ("--q", "--hub_token", "--label_smoothing"):
        assert "did you mean" not in message_of_exit([word, "1"], capsys), word


def test_contradictions_of_several_groups_are_listed_at_once(capsys):
    message = message_of_exit(["--epsilon", "8", "--push_to_hub", "--autoattack_examples", "5"], capsys)
    assert "3 problems" in message


def test_shortening_a_run_keeps_the_drops_that_are_no_longer_reached():
    config = parse_train_config(["--num_train_epochs", "5", "--mining_start_epoch", "2"])
    assert config.training.lr_drops[0].epoch == 60


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttackConfig(epsilon=8),
        lambda: AttackConfig(num_steps=True),
        lambda: AttackConfig(epsilon="8/255"),
        lambda: AttackConfig(epsilon=float("nan")),
        lambda: DataConfig(validation_fraction=1),
        lambda: DataConfig(dataset_name=""),
        lambda: DataConfig(skip_corrupt=1),
        lambda: ModelConfig(model_args={"layers": (1, 1)}),
        lambda: TrainingConfig(lr_drops=((60, 0.1),)),
        lambda: TrainingConfig(optimizer=None),
        lambda: HubConfig(push_to_hub=True),
        lambda: TrainConfig(method=HAM(mining_step=12)),
        lambda: TrainConfig(method=HAM(easy_fraction="all")),
        lambda: TrainConfig(evaluation=EvaluationConfig(eval_step_size=2)),
        lambda: EvaluateConfig(model=""),
    ],
)
def test_configurations_made_in_python_are_checked_too(make):
    with pytest.raises(ConfigError):
        make()


def test_config_error_is_a_value_error_that_carries_its_problems():
    with pytest.raises(ValueError, match="--epsilon") as caught:
        AttackConfig(epsilon=-1.0, num_steps=0)
    assert len(caught.value.problems) == 2


# ---------------------------------------------------------------------------------------------- help, print_config


def test_help_lists_every_setting_with_default_unit_and_range(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train_config(["--help", "all"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for name in set(config_to_dict(TrainConfig(method=PGDAT()))):
        times = len(re.findall(rf"^  --{name}[ ,\n]", shown, re.MULTILINE))
        assert times == 1 or (times > 1 and hasattr(PGDAT(), name)), name
    flat = re.sub(r"\s+", " ", shown)
    assert "in pixel units (> 0; default: 8/255)" in flat
    assert "default: 60:0.1 90:0.01 110:0.005" in flat
    assert "--push_to_hub, --no_push_to_hub" in flat
    for title in ("Data:", "Model:", "Attack (threat model):", "Training:", "Evaluation:", "Hub:", "Method:"):
        assert title in shown


@pytest.fixture
def other_method():
    """A method with an option that another one has too, under another default."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Method):
        name: ClassVar[str] = "other_for_config"
        summary: ClassVar[str] = "made for a test"
        mining_step: int = dataclasses.field(default=7, metadata={"help": "another meaning"})
        loud: bool = dataclasses.field(default=False, metadata={"help": "aloud"})
        gains: tuple[float, ...] = dataclasses.field(default=(1.0,), metadata={"help": "factors"})

    yield Other
    Other.name = "gone"
    del Other
    gc.collect()


def test_methods_may_share_the_name_of_an_option(other_method, capsys, recipe):
    with pytest.raises(SystemExit):
        parse_train_config(["--help", "all"])
    sections = re.sub(r"\s+", " ", capsys.readouterr().out).split("--method ")
    (ham,) = (part for part in sections if part.startswith("ham: "))
    assert "examples still right" in ham
    assert "default: 3" in ham
    assert any("another meaning (default: 7)" in part and "--loud, --no_loud" in part for part in sections)
    argv = ["--method", "other_for_config", "--mining_step", "12", "--loud", "--gains", "1/4", "2"]
    config = parse_train_config(argv)
    assert config.method == other_method(mining_step=12, loud=True, gains=(0.25, 2.0))
    assert load_train_config(recipe(config_to_yaml(config))) == config
    refusal = message_of_exit(["--method", "pgd_at", "--mining_step", "3"], capsys)
    assert "ham, other_for_config, and the method is pgd_at" in refusal
    path = recipe("method: ham\nmining_step: 4\n")
    assert parse_train_config(["--config", str(path), "--method", "other_for_config"]).method == other_method()


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (parse_train_config, ["--model_args", "layers=[1, 2]", "--mixed_precision", "bf16", "--seed", "9"]),
        (parse_evaluate_config, ["me/model", "--dataset_name", "digits"]),
    ],
)
def test_print_config_writes_a_recipe_that_reads_back(capsys, recipe, parse, words):
    argv = [*words, "--epsilon", "4/255"]
    with pytest.raises(SystemExit) as caught:
        parse([*argv, "--print_config"])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.err) == (0, "")
    assert "epsilon: 0.01568627450980392  # 4/255\n" in captured.out
    assert parse(["--config", str(recipe(captured.out))]) == parse(argv)


# ------------------------------------------------------------------------------------------------------ both ways

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
traps = ["none", "null", "~", "no", "true", "1e-3", "010", "8/255", "60:30", "a: b", "# x", "- a", "!x", "&a", "*a"]
traps += ["'", '"', "{", "é", " a ", "a\n b", "\u2028", "\x7f", "a\x85b", "\ufeff", "\uffff"]
texts = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30) | st.sampled_from(traps)
visible = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


def values_of(texts, keys):
    """Plain values, lists and dictionaries of them, with these texts."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    )


plain = values_of(texts, texts | st.just(""))
sides = st.integers(1, 4096)
positive = st.floats(min_value=0, max_value=1, exclude_min=True)
counts = st.integers(min_value=1, max_value=10**9)
epochs_of_drops = st.lists(st.integers(0, 500), min_size=4, max_size=4, unique=True).map(sorted)
factors_of_drops = st.lists(positive, max_size=4, unique=True).map(lambda factors: sorted(factors, reverse=True))
drops = st.builds(lambda *values: tuple(map(LearningRateDrop, *values)), epochs_of_drops, factors_of_drops)
configs = st.builds(
    TrainConfig,
    data=st.builds(
        DataConfig,
        dataset_name=texts,
        dataset_config_name=st.none() | texts,
        label_column=st.none() | texts,
        validation_fraction=st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True),
        skip_corrupt=st.booleans(),
        cache_images=st.sampled_from(["auto", "ram", "none"]),
        limit_train_examples=st.none() | counts,
    ),
    model=st.builds(ModelConfig, model_args=st.dictionaries(names, plain, max_size=4), image_size=st.none() | sides),
    attack=st.builds(AttackConfig, epsilon=positive, step_size=positive, num_steps=st.integers(6, 100)),
    method=st.builds(PGDAT)
    | st.builds(
        HAM,
        mining_step=st.integers(0, 5),
        easy_weight=st.floats(0, 1, exclude_min=True),
        easy_fraction=st.floats(0, 1, exclude_min=True),
        hard_weighting=st.sampled_from(["none", "probability_move", "margin"]),
    ),
    training=st.builds(
        TrainingConfig,
        output_dir=texts,
        learning_rate=st.floats(min_value=0, exclude_min=True, max_value=3e38),
        lr_drops=drops,
        mixed_precision=st.sampled_from(["no", "bf16"]),
        ema_decay=st.none() | st.floats(0.1, 0.999),
        seed=st.integers(0, 2**32 - 1),
    ),
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(config=configs)
@example(config=TrainConfig(model=ModelConfig(model_args={"a": "nan", "b": ".5", "c": "1e-3", "d": -0.0, "e": ""})))
@example(config=TrainConfig(model=ModelConfig(model_args={"a": "\x85"})))
@example(config=TrainConfig(data=DataConfig(dataset_name="\x85", label_column="\ud800")))
def test_yaml_and_back_is_the_same_configuration_and_json_holds_it(config, recipe):
    text = config_to_yaml(config)
    again = load_train_config(recipe(text))
    assert again == config
    assert config_to_yaml(again) == text
    flat = config_to_dict(config)
    assert json.loads(json.dumps(flat)) == flat
    assert flat["method"] == config.method.name
    values = {name: value for owner in groups_of(config) for name, value in vars(owner).items()}
    for name in values.keys() - {"lr_drops", "model_args"}:
        assert flat[name] == (list(values[name]) if isinstance(values[name], tuple) else values[name])


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values_of(texts, visible), max_size=3),
    st.floats(1e-9, 1.0),
    st.booleans(),
    st.none() | counts,
    st.sampled_from([[], ["1:0.5"], ["2:0.1", "30:1e-05"]]),
)
def test_words_read_back_as_the_settings(model_args, rate, flag, steps, drops):
    wanted = {"model_args": model_args, "learning_rate": rate, "epsilon": 8 / 255, "use_cpu": flag}
    wanted |= {"save_steps": steps, "lr_drops": drops}
    found = config_to_dict(parse_train_config(["--dataset_name=digits", *setting_words(wanted)]))
    assert {name: found[name] for name in wanted} == wanted


def test_other_yaml_readers_see_the_same_values():
    config = TrainConfig(training=TrainingConfig(learning_rate=1e-5, lr_drops=(LearningRateDrop(60, 0.1),)))
    seen = yaml.safe_load(config_to_yaml(config))
    assert seen == config_to_dict(config)
    assert seen["learning_rate"] == 1e-5
    assert seen["mixed_precision"] == "no"
    assert seen["lr_drops"] == ["60:0.1"]


def test_names_are_unique_over_groups_and_methods():
    listed = [field.name for owner in groups_of(TrainConfig()) for field in dataclasses.fields(owner)]
    assert len(listed) == len(set(listed))
    for kind in available().values():
        assert not {field.name for field in dataclasses.fields(kind)} & {*listed, "config", "print_config", "method"}


# ------------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize(
    "argv",
    [
        "me/model --dataset_name digits",
        "--dataset_name digits me/model",
        "--dataset-name digits --model me/model",
        "--autoattack me/model --dataset_name digits",
        "--dataset_name digits --use_cpu me/model",
    ],
)
def test_the_model_to_evaluate_is_the_first_word_or_a_flag(argv):
    config = parse_evaluate_config(argv.split())
    assert config.model == "me/model"
    assert config.data.dataset_name == "digits"
    assert config.evaluation.autoattack is ("--autoattack" in argv)


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("me/robust-cifar10", "robust-cifar10"),
        ("hf-hub:me/robust-cifar10", "robust-cifar10"),
        ("outputs/digits-ham/", "digits-ham"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_output_of_an_evaluation_is_named_after_the_model(model, folder):
    config = parse_evaluate_config([model, "--dataset_name", "digits"])
    assert config.output_dir is None
    assert config.output_path.as_posix() == f"evaluation/{folder}"
    assert parse_evaluate_config([model, "--dataset_name=d", "--output_dir", "x/y"]).output_path.as_posix() == "x/y"


@pytest.mark.parametrize("flag", ["lr_drops", "epsilon", "num_steps", "fat_tau_epochs"])
def test_what_is_no_number_is_refused_in_our_words(flag, capsys):
    for written in ("60-0.1", "60:", ":0.1", "sixty:0.1", "60:a tenth", "1/x", "x/2", "8//255", "ten"):
        said = message_of_exit(["--method=fat", f"--{flag}", written], capsys)
        assert f"--{flag} " in said
        assert "expected" in said
        assert not any(python in said for python in ("literal", "convert", "float", "str", "base 10"))
