"""Claims about mpidl.config: what is accepted, what is refused and in which words."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidl import config as configuration
from mpidl.config import Config, config_hash, load, to_toml
from mpidl.errors import ConfigError


def parse(*flags: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    configuration.add_flags(parser)
    return configuration.overrides_from(parser.parse_args(flags))


def test_precedence_is_defaults_then_file_then_flags(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text("epochs = 7\nlr = 1\n")
    made = load(job, parse("--lr", "0.5"))
    assert (made.seed, made.epochs, made.lr) == (0, 7, 0.5)


def test_an_integer_for_a_float_field_becomes_a_float() -> None:
    made = Config(lr=1)
    assert type(made.lr) is float
    assert to_toml(made) == to_toml(Config(lr=1.0))


def test_a_toml_table_section_is_a_table_field(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text("epochs = 2\n[optimizer_args]\nmomentum = 0.9\n")
    assert load(job).optimizer_args == {"momentum": 0.9}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": True}, "epochs is True (bool), must be an integer"),
        ({"epochs": 1.5}, "epochs is 1.5 (float), must be an integer"),
        ({"epochs": 0}, "epochs is 0, must be at least 1"),
        ({"lr": -0.1}, "lr is -0.1, must be at least 0"),
        ({"lr": float("nan")}, "lr is nan, must be a finite number"),
        ({"lr": "fast"}, "lr is 'fast' (str), must be a number"),
        ({"seed": 2**63}, "seed is 9223372036854775808, must be at most 9223372036854775807"),
        ({"group_size": "atuo"}, "group_size is 'atuo', must be an integer or 'auto'; did you mean auto?"),
        ({"group_size": 0}, "group_size is 0, must be at least 1"),
        ({"reduction": "mpi4"}, "must be 'ordered' or 'mpi' or 'driver' or 'tree' or 'allreduce'; did you mean mpi?"),
        ({"reduction": 3}, "reduction is 3 (int), must be 'ordered' or 'mpi' or 'driver'"),
        ({"optimizer": "adamv"}, "or package.module:callable; did you mean adam or"),
        ({"model": ""}, "model is empty"),
        ({"run_dir": "\udc80"}, "not valid UTF-8"),
        ({"model_args": [1]}, "model_args is [1] (list), must be a table"),
        ({"model_args": {"a": {"b": None}}}, "model_args.a.b is None (NoneType)"),
        (
            {"batch_size": 4},
            "batch_size 4 is smaller than partitions 8; every partition needs at least one sample",
        ),
    ],
)
def test_a_bad_value_is_refused_with_the_value_and_the_bound(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Config(**values)
    assert message in str(raised.value)


def test_own_callables_and_an_unset_data_dir_are_accepted() -> None:
    made = Config(optimizer="my.module:Adam", loss="my.module:loss", data_dir=None)
    assert made.data_dir is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 4\n", "unknown key 'batchsize'; did you mean batch_size or"),
        ("zzz = 4\n", "unknown key 'zzz'; `mpidl train --help` lists all"),
        ("epochs = true\n", "epochs is True (bool), must be an integer"),
        ("data = 2020-01-01\n", "must be a string"),
        ("epochs = \n", "is not valid TOML: Invalid value (at line 1, column 10)"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    job = tmp_path / "job.toml"
    job.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(job)
    assert str(raised.value).startswith(str(job))
    assert message in str(raised.value)


def test_a_file_that_is_missing_a_folder_or_binary_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "directory"),
        (binary, "UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(path)


def test_flags_not_given_override_nothing() -> None:
    assert parse() == {}


def test_flags_are_converted_to_their_fields_types() -> None:
    assert parse(
        "--batch-size", "32", "--lr", "1e-3", "--group-size", "auto", "--threads-per-rank", "2",
        "--optimizer-args", "{momentum = 0.9, nesterov = true}", "--reduction", "mpi", "--run-dir", "runs/x",
        "--error-feedback", "true", "--validate-every", "0", "--checkpoint-every", "seconds(60)",
        "--data-args", "{augment = true}",
    ) == {
        "batch_size": 32, "lr": 0.001, "group_size": "auto", "threads_per_rank": 2,
        "optimizer_args": {"momentum": 0.9, "nesterov": True}, "reduction": "mpi", "run_dir": "runs/x",
        "error_feedback": True, "validate_every": 0, "checkpoint_every": "seconds(60)",
        "data_args": {"augment": True},
    }  # fmt: skip


def test_a_flag_takes_back_what_the_job_file_sets(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text("end_when = 'reached(\"accuracy\", 0.9)'\nmax_seconds = 60\nclip_norm = 1.0\nkeep_last = 2\n")
    flags = parse("--end-when", "none", "--max-seconds", "none", "--clip-norm", "none", "--keep-last", "none")
    assert load(job, flags) == Config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr", "none"), "--lr is 'none', must be a number"),
        (("--epochs", "two"), "--epochs is 'two', must be an integer"),
        (("--epochs", "0"), "--epochs: epochs is 0, must be at least 1"),
        (("--group-size", "x"), "--group-size is 'x', must be an integer or 'auto'"),
        (("--optimizer-args", "momentum=0.9"), "--optimizer-args is 'momentum=0.9', must be a table such as"),
        (("--error-feedback", "yes"), "--error-feedback is 'yes', must be true or false"),
        (("--error-feedback", "1"), "error_feedback is 1 (int), must be true or false"),
        (("--model-args", "3"), "--model-args: model_args is 3 (int), must be a table"),
        (("--validate-every", "-1"), "validate_every is -1, must be at least 0"),
        (("--schedule", "cosin"), "did you mean cosine?"),
    ],
)
def test_a_bad_flag_is_refused_by_its_name(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(*flags)
    assert message in str(raised.value)


def test_an_unknown_override_names_the_near_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean epochs"):
        load(None, {"epoch": 3})


def test_every_field_has_a_help_text_and_a_flag() -> None:
    parser = argparse.ArgumentParser()
    configuration.add_flags(parser)
    text = parser.format_help()
    for field in dataclasses.fields(Config):
        assert field.metadata["help"]
        assert f"--{field.name.replace('_', '-')} " in text


texts = st.text(st.characters(codec="utf-8"))
tables = st.dictionaries(
    texts,
    st.recursive(
        st.integers() | st.floats(allow_nan=False) | st.booleans() | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@given(
    lr=st.floats(0, 1e300),
    group_size=st.integers(1, 10**12) | st.just("auto"),
    data_dir=st.none() | texts.filter(bool),
    model_args=tables,
    error_feedback=st.booleans(),
)
def test_what_is_written_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    lr: float,
    group_size: Any,
    data_dir: str | None,
    model_args: dict[str, Any],
    error_feedback: bool,
) -> None:
    made = Config(lr=lr, group_size=group_size, data_dir=data_dir, model_args=model_args, error_feedback=error_feedback)
    job = tmp_path_factory.mktemp("job") / "job.toml"
    job.write_bytes(to_toml(made).encode())
    assert load(job) == made


def test_the_hash_covers_what_ranks_must_agree_on_and_nothing_else() -> None:
    base = Config()
    assert config_hash(base) == config_hash(Config())
    assert config_hash(base) != config_hash(Config(seed=1))
    assert config_hash(base) != config_hash(Config(model_args={"width": 2}))
    assert config_hash(base) == config_hash(Config(run_dir="elsewhere", data_dir="/local", loader_workers=2))
