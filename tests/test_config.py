"""Flags: one dataclass, one parser, YAML in front of the command line."""

from dataclasses import dataclass

import pytest

from llada.flags.parser import check_command_line, flag, parse
from llada.flags.yaml_files import read_yaml, write_yaml


@dataclass(kw_only=True)
class Config:
    """Flags for the tests."""

    output_dir: str = flag(help="Where to.")
    learning_rate: float = flag(1e-4, help="100% of the peak.")
    max_steps: int | None = flag(None, help="Steps.")
    shuffle: bool = flag(True, help="Shuffle.")
    layers: list[str] = flag(["q_proj"], help="Layers.")
    kind: str = flag("a", help="Kind.", choices=["a", "b"])


def test_yaml_numbers_lists_and_booleans(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "learning_rate: 4e-4\nlayers: [q_proj, v_proj]\nshuffle: false\noutput_dir: out\nmax_steps:\n"
    )
    config = parse(Config, ["--config", str(file)])
    assert config == Config(
        output_dir="out", learning_rate=4e-4, shuffle=False, layers=["q_proj", "v_proj"], max_steps=None
    )


def test_command_line_wins_over_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: from_yaml\nlr: 1\n")
    config = parse(Config, [f"--config={file}", "--output-dir", "from_flags", "--no_shuffle"])
    assert (config.output_dir, config.learning_rate, config.shuffle) == ("from_flags", 1.0, False)


def test_written_config_reproduces_the_run(tmp_path):
    config = parse(Config, ["--output_dir", "a b", "--lr", "0.5", "--layers", "x", "y", "--shuffle", "no"])
    write_yaml(config, tmp_path / "c.yaml")
    assert parse(Config, ["--config", str(tmp_path / "c.yaml")]) == config


def test_list_defaults_are_not_shared():
    first = parse(Config, ["--output_dir", "x"])
    first.layers.append("k_proj")
    assert parse(Config, ["--output_dir", "x"]).layers == ["q_proj"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--output_dir", "x", "--learning_rat", "1"],
            "unknown argument '--learning_rat': did you mean 'learning_rate'",
        ),
        (["--output_dir", "x", "--learn", "1"], "unknown argument '--learn'"),  # abbreviations are refused
        (["--output_dir", "x", "stray"], "unknown argument 'stray'"),
        (["--lr", "1"], "required: --output_dir"),
        (["--output_dir", "x", "--lr", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--output_dir", "x", "--kind", "c"], "--kind 'c': choose from a, b"),
    ],
)
def test_bad_command_lines(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stop:
        check_command_line(Config, "A manual.")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("train.py: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("learning_rte: 1\noutput_dir: x\n", "unknown key 'learning_rte': did you mean 'learning_rate'"),
     ("learning_rate:\noutput_dir: x\n", "learning_rate has no value")],
)  # fmt: skip
def test_bad_yaml_keys(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(Config, ["--config", str(file)])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"- a\n- b\n", "expected 'key: value' lines, got list"), (b"a: [1\n", "not valid YAML"),
     (b"a: \xff\n", "not valid YAML")],
)  # fmt: skip
def test_unreadable_yaml(content, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(file)
    assert str(file) in str(error.value)


def test_missing_yaml_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_yaml("nowhere.yaml")


def test_help_shows_defaults_and_percent_signs(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], description="A manual.\n\nRun:\n    this")
    out = capsys.readouterr().out
    assert "100% of the peak. (default: 0.0001)" in out
    assert "Run:\n    this" in out
