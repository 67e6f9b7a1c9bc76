"""Claims about scales.py: which value wins, what a bad input looks like, and that files are whole or absent."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import scales
from scales import BadInput

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Settings:
    """A script's settings."""
    scale: str = "laptop"  # column
    genes: int = 50  # in the table
    context: int = 8  # in the table
    guidance: float = 2.0  # not in the table


@dataclasses.dataclass(frozen=True)
class Worded:
    """Settings with a word in front."""
    what: "scales.tyro.conf.Positional[str]"  # which section
    scale: str = "laptop"  # column
    genes: int = 50  # in the table


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("argv, scale", [([], "laptop"), (["--scale", "smoke"], "smoke"), (["--scale=paper"], "paper"),
                                         (["--guidance", "1.0", "--scale", "paper"], "paper")])
def test_scale_picks_the_column(argv, scale):
    """--scale fills the fields from its column of the table, in either spelling, at any place; without it: laptop."""
    s = scales.parse(Settings, ("linear",), argv)
    assert s.scale == scale
    column = scales.SCALES.index(scale)
    assert (s.genes, s.context) == tuple(scales.TABLE["linear"][name][column] for name in ("genes", "context"))


def test_what_the_table_does_not_list_keeps_its_default():
    """The default in the class, which is the paper's value, holds at every scale."""
    assert scales.parse(Settings, ("linear",), ["--scale", "smoke"]).guidance == 2.0
    assert scales.parse(Settings, (), ["--scale", "smoke"]).genes == 50


def test_what_is_given_wins():
    """A flag wins over the table, wherever it stands."""
    s = scales.parse(Settings, ("linear",), ["--genes", "7", "--scale", "smoke", "--guidance", "3.5"])
    assert (s.scale, s.genes, s.guidance) == ("smoke", 7, 3.5)


def test_later_section_wins():
    """`scratch` is `real` with another learning rate."""
    real, scratch = scales.at("paper", "model", "real"), scales.at("paper", "model", "real", "scratch")
    assert (real["learning_rate"], scratch["learning_rate"]) == (5e-5, 1e-4)
    assert {k for k in real if real[k] != scratch[k]} == {"learning_rate"}


@pytest.mark.parametrize("argv", [["--scale", "big"], ["--scale=big"], ["--scale"]])
def test_unknown_scale_is_refused(argv):
    """The message names what was given, and the three that exist."""
    with pytest.raises(BadInput, match="--scale .*: expected one of smoke, laptop, paper"):
        scales.parse(Settings, ("linear",), argv)


def test_word_picks_the_section():
    """Where sections depend on the word in front, it does."""
    pick = lambda word: (word,)
    assert scales.parse(Worded, pick, ["linear", "--scale", "paper"]).genes == 20
    assert scales.parse(Worded, pick, ["grn", "--scale", "paper"]).genes == 50


def test_word_after_the_options_is_no_trap():
    """`--scale smoke linear` is `linear --scale smoke`, or refused: never the defaults of another size, unnoticed."""
    pick = lambda word: {"linear": ("linear",)}.get(word, ())
    try:
        assert scales.parse(Worded, pick, ["--scale", "smoke", "linear"]).genes == 8
    except BadInput:
        pass


def test_the_table_is_complete():
    """Every value has three columns of one kind (None: not set), and fills a field of a script or a baseline's option;
    paper sizes are the paper's."""
    fields = set()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]:
        classes = [n for n in ast.parse(file.read_text()).body
                   if isinstance(n, ast.ClassDef) and n.name in ("Settings", "Options")]
        fields |= {f.target.id for c in classes for f in c.body if isinstance(f, ast.AnnAssign)}
    for rows in scales.TABLE.values():
        for name, row in rows.items():
            assert (name in fields and len(row) == 3
                    and len({type(value) for value in row if value is not None}) == 1), name
    for prior, micro_batches in (("linear", 50_000), ("grn", 400_000)):
        s = scales.at("paper", "model", prior)
        assert s["updates"] * s["accumulate"] == micro_batches and s["learning_rate"] == 1e-4 and s["ema"] == 0.999


@pytest.mark.parametrize("script, word", [("train", "linear"), ("train", "finetune"), ("sample", "linear"),
                                          ("sample", "leukemia"), ("tables", None), ("baselines", "linear"),
                                          ("data", None), ("prior", None)])
def test_every_script_has_a_command_line(script, word):
    """Each script's settings can be read at each scale."""
    module = __import__(script)
    source = getattr(module, "SECTIONS", {})
    sections = (lambda w: source.get(w, ("real", "evaluate"))) if source else ("linear",)
    for scale in scales.SCALES:
        s = scales.parse(module.Settings, sections, [*([word] if word else []), "--scale", scale])
        assert s.scale == scale


# -------------------------------------------------------------------------------------------------------- files, errors


def test_atomic_replaces_on_success(tmp_path):
    """The new content takes the place of the old, folders are made, and no temporary file stays."""
    path = tmp_path / "a" / "b" / "file.npz"
    for content in ("old", "new"):
        with scales.atomic(path) as temporary:
            assert temporary != path and temporary.suffix == ".npz" and temporary.parent == path.parent
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_keeps_the_old_file_on_failure(tmp_path, error):
    """Whatever ends the writing, half a file is never seen, and the old one stays."""
    path = tmp_path / "file.txt"
    with pytest.raises(error), scales.atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with pytest.raises(error), scales.atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", ["scales.BadInput('column x: no such column')", "OSError(28, 'No space left')"])
def test_bad_input_is_one_line_and_status_1(error):
    """The user sees one line that begins with error:, and no traceback."""
    done = run_python(f"import scales\ndef main(): raise {error}\nscales.run(main)")
    assert done.returncode == 1 and done.stdout == ""
    line, = done.stderr.splitlines()
    assert line.startswith("error: ") and ("no such column" in line or "No space left" in line)


@pytest.mark.parametrize("command", ["prior.py --contexts 2 --num-shards 1 --out {}", "data.py --dataset toy --out {}"])
def test_a_full_disk_leaves_nothing(tmp_path, command):
    """No file can have more than 4 blocks: a last line says so, the status is 1, and nothing is left half-written."""
    limited = ["sh", "-c", 'ulimit -f 4; exec "$@"', "sh", sys.executable, *command.format(tmp_path).split()]
    done = subprocess.run([*limited, "--scale", "smoke"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "File too large" in done.stderr
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".npz", ".h5ad")]


def test_a_bug_keeps_its_traceback():
    """What is not the user's mistake is not dressed up as one."""
    with pytest.raises(ZeroDivisionError):
        scales.run(lambda: 1 / 0)


def test_run_passes_arguments_on():
    """And a main that ends well ends the script well."""
    seen = []
    scales.run(seen.append, 3)
    assert seen == [3]


def test_the_table_is_printed():
    """`python scales.py` shows every section and value, in three columns."""
    done = subprocess.run([sys.executable, "scales.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    for section, rows in scales.TABLE.items():
        assert f"\n{section} " in "\n" + done.stdout
        assert all(len(line.split()) == 4 for line in done.stdout.splitlines() if line.split()[0] in rows)


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_revision(tmp_path, monkeypatch):
    """Outside a repository: unknown; in one: the short hash; with a + while a file differs from it."""
    monkeypatch.setattr(scales, "__file__", str(tmp_path / "scales.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert scales.revision() == "unknown"
    (tmp_path / "scales.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "scales.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    assert scales.revision() == git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "scales.py").write_text("2\n")
    assert scales.revision() == git(tmp_path, "rev-parse", "--short", "HEAD") + "+"
