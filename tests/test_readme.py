"""Claims about README.md: what it points to exists, and its commands have the scripts, words and flags that it says."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="there is no README.md")
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
POINTERS = sorted(set(re.findall(r"`((?:tests/|baselines/)?\w+\.py):([\w.]+)(?:\(\))?`", TEXT)))
COMMANDS = sorted(set(re.findall(r"(?m)^[ \t$>]*((?:\w+=\S+ +)*python3? +[\w/]+\.py\b[^\n`#]*)", TEXT)
                      + re.findall(r"`(python3? +[\w/]+\.py\b[^\n`]*)`", TEXT)))


def names_in(file: Path) -> set[str]:
    """Functions, classes, methods and fields (with or without their class) and module-level names of a file."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [n.name if isinstance(n, ast.FunctionDef) else n.target.id for n in node.body
                     if isinstance(n, (ast.FunctionDef, ast.AnnAssign))]
            names |= {*inner, *(f"{node.name}.{name}" for name in inner)}
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        targets = [t for t in targets if t is not None]
        names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def fields_of(file: Path) -> set[str]:
    """Fields of the script's Settings."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return set()


def test_the_map_is_there():
    """The README maps the paper to code: it has pointers of the form `file.py:name`, and commands."""
    assert len(POINTERS) > 10 and COMMANDS


@pytest.mark.parametrize("file, name", POINTERS)
def test_pointer_leads_somewhere(file, name):
    """Every `file.py:name` is a function, class, method or constant of that file."""
    assert (ROOT / file).is_file(), f"{file} does not exist"
    assert name in names_in(ROOT / file), f"{file} has no {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_fits_its_script(command):
    """The script exists, and every flag is one of its settings."""
    words = shlex.split(command.split("|")[0].split("&&")[0].split(";")[0].rstrip("\\ "))
    words = words[[w in ("python", "python3") for w in words].index(True) + 1 :]
    script = ROOT / words[0]
    assert script.is_file(), f"{script.name} does not exist"
    flags = [w[2:].split("=")[0].replace("-", "_") for w in words[1:] if w.startswith("--")]
    known = fields_of(script) | {"help"}
    for flag in flags:
        assert flag in known or flag.removeprefix("no_") in known, f"{script.name} has no --{flag.replace('_', '-')}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", TEXT))))
def test_link_leads_somewhere(path):
    """Every relative link is a file of the repository."""
    assert (ROOT / path).exists(), f"{path} does not exist"


def test_ledger_and_code_name_the_same_departures():
    """Every D-number in the code has its row in the ledger, and every row is tagged in the code."""
    code = "\n".join(f.read_text(encoding="utf-8") for f in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])
    tagged = set(re.findall(r"\[(D\d+)\]", code))
    listed = re.findall(r"(?m)^\| (D\d+) \|", TEXT)
    assert len(listed) == len(set(listed)) and tagged == set(listed)


# --------------------------------------------------------------------------------- the results, and where they are from

REPORT = ROOT / "results" / "laptop" / "report.json"
TABLES = re.findall(r"<!-- report\.json (\S+): ([\w ]+) -->\n\n((?:\|.*\n)+)", TEXT)


def test_tables_are_the_report_s():
    """Each table of results in the README is what tables.py makes of the committed report.json, cell by cell."""
    import tables

    document = json.loads(REPORT.read_text(encoding="utf-8"))
    assert len(TABLES) >= 2
    for name, metrics, text in TABLES:
        lines = text.strip().splitlines()
        titles = [line.split("|")[1].strip() for line in lines[2:]]
        rows = [row for row in document["tables"][name]["rows"] if row["title"] in titles]
        assert lines == tables.markdown(rows, tuple(metrics.split()), paper=False)


def test_numbers_in_the_prose_are_the_report_s():
    """Every number between the results' tables is in the committed report too; nothing is told that is not in it."""
    section = TEXT.split("## Results at laptop scale")[1].split("\n## ")[0]
    prose = re.sub(r"<!--.*?-->|(?m:^\|.*$)|\]\(.*?\)", " ", section)
    report = (ROOT / "results" / "laptop" / "report.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d[\d.,]*\d%?|\d%?", prose))
    assert numbers and not {n for n in numbers if n not in report}


def test_reference_rows_are_those_of_the_runs():
    """Every mean and deviation beside the paper's reference rows is in one of the two committed runs."""
    section = TEXT.split("The paper's own reference rows")[1].split("\n## ")[0]
    files = (ROOT / "results" / f"{name}.md" for name in ("reference", "reference-450"))
    runs = "".join(file.read_text(encoding="utf-8") for file in files)
    values = set(re.findall(r"\d[\d.]* ± [\d.]*\d", section))
    assert len(values) > 10 and not {value for value in values if value not in runs}


def test_every_test_that_is_named_exists():
    """`test_x.py::test_y` is a test of tests/test_x.py."""
    named = set(re.findall(r"(test_\w+\.py)::(test_\w+)", TEXT))
    assert len(named) > 5
    for file, name in named:
        assert name in names_in(ROOT / "tests" / file), f"{file} has no {name}"
