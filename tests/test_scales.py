"""Claims about scales.py: which value wins, what a bad input looks like, and that files are whole or absent."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scales
from scales import BadInput

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Settings:
    """A script's settings."""
    kind: "scales.tyro.conf.Positional[str]" = "linear"  # which section
    scale: str = "laptop"  # column
    genes: int = 50  # in the table
    context: int = 8  # in the table
    guidance: float = 2.0  # not in the table


def parse(*argv) -> Settings:
    return scales.parse(Settings, lambda s: (s.kind,), list(argv))


def run(*command, folder=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("argv, genes, context", [
    ([], 20, 4), (["--scale", "smoke"], 8, 2), (["--scale=paper"], 20, 4), (["grn", "--scale", "paper"], 50, 8),
    (["grn"], 20, 8), (["--scale", "smoke", "grn"], 8, 8), (["--genes", "7", "--scale", "smoke"], 7, 2)])
def test_what_is_given_wins_then_the_table_then_the_paper(argv, genes, context):
    """--scale fills the fields from its column of the section; a flag wins over it, wherever it stands; what neither
    names, or has no number of its own at this scale, keeps the default of the class, which is the paper's."""
    s = parse(*argv)
    assert (s.genes, s.context, s.guidance) == (genes, context, 2.0)


def test_later_sections_win_and_unknown_scales_are_refused():
    """Fine-tuning is training on real cells, with other learning rates. The message names the scale that was given."""
    real, tuned = scales.at("paper", "train", "real"), scales.at("paper", "train", "real", "finetune")
    assert {name for name in tuned if real.get(name) != tuned[name]} == {"learning_rate", "rates"}
    assert tuned["learning_rate"] == 5e-5 and scales.at("paper", "no such section") == {}
    for argv in (["--scale", "big"], ["--scale=big"]):
        with pytest.raises(BadInput, match="--scale big"):
            parse(*argv)


def test_dry_is_paper_with_fewer_of_everything():
    """Whatever shapes a network, a task or a cell is the paper's; numbers of things are the least; a section that a
    method has for one kind of data does not bring back the paper's number."""
    for section in scales.TABLE:
        paper, dry = scales.at("paper", section), scales.at("dry", section)
        assert dry == paper | scales.DRY.get(section, {})
        assert not {"genes", "cells", "context", "width", "depth", "population"} & scales.DRY.get(section, {}).keys()
    assert scales.at("dry", "condot", "condot-linear")["updates"] == 50
    assert scales.at("dry", "train", "linear")["updates"] == 1
    s = parse("--scale", "dry")
    assert (s.genes, s.context, s.guidance) == (20, 4, 2.0)
    assert "dry: as paper" in run(sys.executable, "scales.py").stdout


def test_the_table_is_complete_and_says_nothing_twice():
    """Every name is a setting of a script. There are two numbers of one kind, and a third only where the paper has
    a value of its own for this kind of data. `python scales.py` shows every section and value, in three columns."""
    classes = [node for file in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]
               for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = {field.target.id for node in classes for field in node.body
              if isinstance(field, ast.AnnAssign) and field.value is not None}
    printed = run(sys.executable, "scales.py").stdout.split("\ndry:")[0]
    assert {name for rows in scales.DRY.values() for name in rows} <= fields
    for section, rows in scales.TABLE.items():
        assert f"\n{section} " in "\n" + printed
        assert all(len(line.split()) == 4 for line in printed.splitlines() if line.split()[0] in rows)
        for name, row in rows.items():
            assert name in fields and len(row) in (2, 3), name
            assert len({type(value) for value in row if value is not None}) == 1, name
    for section in ("train", "evaluate", "figures", "cpa", "condot", "mfm", "cellflow", "state"):
        assert all(len(row) == 2 for row in scales.TABLE[section].values()), section  # the paper's are the defaults


@pytest.mark.parametrize("script", ["prior", "data", "train", "sample", "baselines", "figures", "tables"])
def test_every_script_can_be_asked_for_help(script):
    """`--help` of each ends with status 0 and tells the scale."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        scales.parse(module.Settings, lambda s: (), ["--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("content", [str, dict])
def test_atomic_replaces_on_success_and_keeps_the_old_on_failure(tmp_path, content):
    """Files and folders: whole or not there at all, whatever ends the writing; no temporary one stays."""
    path = tmp_path / "a" / "file.npz"

    def write(temporary):
        if content is dict:
            temporary.mkdir()
            temporary = temporary / "inside"
        temporary.write_text("half")

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), scales.atomic(path) as temporary:
            assert temporary.suffix == ".npz" and temporary.parent == path.parent
            write(temporary)
            raise error
        assert not list(path.parent.iterdir())
    with scales.atomic(path) as temporary:
        write(temporary)
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]


def test_other_settings_are_named():
    """Values are compared as a file would hold them; the message has the path, the name and both values."""
    scales.check_made("x.npz", {"a": [1, 2], "p": "y"}, {"a": (1, 2), "p": Path("y")})
    with pytest.raises(BadInput, match="x.npz was made with other settings .a 1, now 2; b None, now 3"):
        scales.check_made("x.npz", {"a": 1}, {"a": 2, "b": 3})


@pytest.mark.parametrize("error", ["scales.BadInput('column x: no such column')", "OSError(28, 'No space left')"])
def test_bad_input_is_one_line_and_status_1(error):
    """The user sees one line that begins with error:, and no traceback, but for a bug, which keeps its own."""
    done = run(sys.executable, "-c", f"import scales\ndef main(): raise {error}\nscales.run(main)")
    assert done.returncode == 1 and done.stdout == ""
    line, = done.stderr.splitlines()
    assert line.startswith("error: ")
    with pytest.raises(ZeroDivisionError):
        scales.run(lambda: 1 / 0)


def test_streams_do_not_meet():
    """Each use and each tuple of numbers has a stream of its own, the same every time; NumPy alone takes 1 for 1, 0."""
    names = [("tasks", 0), ("tasks", 0, 0), ("tasks", 1), ("validation", 0), ("prior", 0)]
    drawn = {scales.generator(*name).integers(2**62) for name in names}
    assert len(drawn) == len(names) and scales.generator(*names[0]).integers(2**62) in drawn
    assert len({str(scales.key(*name)) for name in names}) == len(names)
    assert np.random.default_rng([1]).integers(2**62) == np.random.default_rng([1, 0]).integers(2**62)


def test_revision(tmp_path, monkeypatch):
    """Outside a repository: unknown; in one: the short hash; with a + while a file differs from it."""
    monkeypatch.setattr(scales, "__file__", str(tmp_path / "scales.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert scales.revision() == "unknown"
    (tmp_path / "scales.py").write_text("1\n")
    commit = "-c user.name=test -c user.email=test@example.org commit -q -m one"
    for words in ("init -q", "add scales.py", commit, "rev-parse --short HEAD"):
        done = run("git", *words.split(), folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert scales.revision() == done.stdout.strip() != ""
    (tmp_path / "scales.py").write_text("2\n")
    assert scales.revision() == done.stdout.strip() + "+"


@pytest.mark.parametrize("words, named", [(["giant"], "giant"), (["smoke", "--leukemia", "none.h5ad"], "none.h5ad"),
                                          (["--screen"], "--screen"), (["--out"], "--out")])
def test_run_all_refuses_what_it_does_not_know(words, named):
    """Unknown words and missing files end run_all.sh with a message before anything is installed or run."""
    done = run("bash", "run_all.sh", *words)
    assert done.returncode in (1, 2) and named in done.stderr and done.stdout == ""
