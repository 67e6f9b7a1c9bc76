"""Claims about README.md and the ledgers: what they point to exists, their commands can be given, their numbers are the
report's."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LEDGERS = [(ROOT / name).read_text(encoding="utf-8") for name in ("DEPARTURES.md", "baselines/DEPARTURES.md")]
COMMANDS = re.findall(r"python (?:-m )?[\w.]+[^\n`#]*", README)


def names_in(file: Path) -> set[str]:
    """Functions, classes and module-level names of a file."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names


def test_pointers_lead_somewhere():
    """Every `file.py:name` of the map from the paper to the code is a function, class or constant of that file, every
    `test_x.py::test_y` of the ledgers a test, and every relative link a file."""
    pointers = re.findall(r"`((?:baselines/)?\w+\.py):(\w+)`", README)
    tests = re.findall(r"(test_\w+\.py)::(test_\w+)", "".join(LEDGERS))
    assert len(pointers) > 30 and len(tests) > 5
    for file, name in pointers + [(f"tests/{file}", name) for file, name in tests]:
        assert name in names_in(ROOT / file), f"{file} has no {name}"
    for folder, text in ((ROOT, README), (ROOT, LEDGERS[0]), (ROOT / "baselines", LEDGERS[1])):
        for path in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (folder / path).exists(), f"{path} does not exist"


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_can_be_given(command):
    """Every command of the README is understood by its script, word by word."""
    words = [word for word in shlex.split(command)[1:] if word != "-m"]
    module = importlib.import_module(words[0].removesuffix(".py"))
    if hasattr(module, "Settings"):
        tyro.cli(module.Settings, args=words[1:])
    else:
        assert len(words) == 1


def test_ledgers_and_code_name_the_same_departures():
    """Every D-number in the code has its row in a ledger, just once, and every row is tagged in the code."""
    code = ""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]:
        code += file.read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^\| (D\d+) \|", "".join(LEDGERS))
    assert len(listed) == len(set(listed)) and set(re.findall(r"\[(D\d+)\]", code)) == set(listed)


def test_tables_are_the_report_s():
    """Each table of results in the README is what tables.py makes of the committed report.json, cell by cell."""
    import tables

    document = json.loads((ROOT / "results" / "laptop" / "report.json").read_text(encoding="utf-8"))
    found = re.findall(r"<!-- report\.json (\S+): ([\w ]+) -->\n\n((?:\|.*\n)+)", README)
    assert len(found) == 2
    for name, wanted, text in found:
        lines = text.strip().splitlines()
        titles = [line.split("|")[1].strip() for line in lines[2:]]
        rows = [row for row in document["tables"][name]["rows"] if row["title"] in titles]
        assert len(rows) == len(titles) >= 6 and lines == tables.markdown(rows, tuple(wanted.split()), paper=False)


def test_the_page_beyond_the_paper_quotes_its_reports():
    """Each number with an error on that page stands in one of the three reports."""
    folder = ROOT / "results" / "beyond"
    page = (folder / "README.md").read_text(encoding="utf-8")
    names = "report.md", "report-50-genes.md", "report-h100.md"
    reports = "".join((folder / name).read_text(encoding="utf-8") for name in names)
    quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+", page)
    assert len(quoted) > 60 and not [number for number in quoted if number not in reports]


def test_the_readme_is_short():
    """At most 10 kB."""
    assert len(README.encode()) <= 10_000
