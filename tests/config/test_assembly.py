"""Files of earlier versions: read where they mean the same, refused with the new name elsewhere."""

from __future__ import annotations

import pytest

from ham_hf.config import ConfigError, config_to_yaml, load_train_config, parse_train_config
from ham_hf.methods import HAM, PGDAT
from ham_hf.reporting.method_text import method_rows


def written(folder, text):
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


@pytest.mark.parametrize(
    ("lines", "method"),
    [
        ("keep_easy_fraction: 0.0\nkeep_easy_as: adversarial\n", HAM()),
        ("keep_easy_fraction: 0\nkeep_easy_as: clean\n", HAM()),
        ("keep_easy_as: adversarial\n", HAM()),
        ("keep_easy_fraction: 0.3\nkeep_easy_as: adversarial\n", HAM(easy_weight=1.0, easy_fraction=0.3)),
        ("keep_easy_fraction: 3/10\n", HAM(easy_weight=1.0, easy_fraction=0.3)),
        ("keep_easy_fraction: 1.0\n", HAM(easy_weight=1.0)),
    ],
)
def test_a_file_that_means_the_same_is_read(tmp_path, lines, method):
    config = load_train_config(written(tmp_path, f"method: ham\n{lines}"))
    assert config.method == method
    # What the run writes has today's names.
    assert load_train_config(written(tmp_path, config_to_yaml(config))) == config
    assert "keep_easy" not in config_to_yaml(config)


def test_a_flag_wins_over_what_the_old_file_means(tmp_path):
    path = written(tmp_path, "method: ham\nkeep_easy_fraction: 0.3\n")
    assert parse_train_config(["--config", str(path), "--easy_fraction", "1"]).method == HAM(easy_weight=1.0)
    assert parse_train_config(["--config", str(path), "--method", "pgd_at"]).method == PGDAT()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("keep_easy_fraction: 0.3\nkeep_easy_as: clean\n", "line 3: keep_easy_as clean: .*--easy_weight"),
        ("keep_easy_fraction: 0.3\neasy_weight: 0.5\n", "line 2: --keep_easy_fraction is now --easy_weight"),
        ("keep_easy_fraction: 1.5\n", r"line 2: --easy_fraction 1\.5: expected a number in \(0, 1\]"),
        ("keep_easy_fraction: some\n", "line 2: --easy_fraction some: expected a number"),
    ],
)
def test_a_file_that_means_something_else_is_refused_with_the_new_name(tmp_path, lines, expected):
    with pytest.raises(ConfigError, match=expected):
        load_train_config(written(tmp_path, f"method: ham\n{lines}"))


def test_a_report_of_an_earlier_version_shows_what_it_was_trained_with():
    old = {"method": "ham", "mining_step": 3, "keep_easy_fraction": 0.3, "keep_easy_as": "clean"}
    rows = dict(method_rows(old, averaged=False))
    assert rows["Method option keep_easy_fraction"] == "0.3"
    assert rows["Method option keep_easy_as"] == "clean"
    off = dict(method_rows(old | {"keep_easy_fraction": 0.0}, averaged=False))
    assert not [label for label in off if "easy" in label]


def test_a_report_of_today_shows_what_is_set():
    shown = [
        ({"easy_weight": 0.0, "easy_fraction": 1.0, "stop_misclassified": False}, {}),
        ({"easy_weight": 0.4, "easy_fraction": 1.0}, {"easy_weight": "0.4"}),
        ({"easy_weight": 1.0, "easy_fraction": 0.3}, {"easy_weight": "1.0", "easy_fraction": "0.3"}),
        ({"stop_misclassified": True}, {"stop_misclassified": "yes"}),
    ]
    for config, expected in shown:
        rows = dict(method_rows({"method": "ham", **config}, averaged=False))
        options = {label: value for label, value in rows.items() if "_" in label}
        assert options == {f"Method option {name}": value for name, value in expected.items()}
