"""The course: make the student's version of this repository, check it, and grade the hunt for bugs (COURSE.md).

    python course.py make FOLDER    a copy in which the functions of all exercises are empty, and four bugs are planted
    python course.py check          do the tests of each exercise pass here, and fail in the student's version? (CI)
    python course.py hunt FOLDER    which planted bugs does FOLDER/tests/test_hunt.py find, and is it right otherwise?

A function below a comment "# Exercise N" is one of exercise N; a test with the mark `exerciseN` grades it. The
student's version keeps these tests only: others would give the planted bugs away. EXERCISES.md there says what is asked.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import scales
from scales import BadInput

HERE = Path(__file__).parent
EXERCISES = range(1, 9)  # with tests of ours; 9 is the hunt, 10 is open
MARK = re.compile(r"\s*# Exercise (\d+)$")
KEPT_BACK = ("course.py", "COURSE.md", "tests/kills.sh", "tests/benchmark.py", ".ci/run")


class Bug(NamedTuple):
    """One line that goes wrong in silence: no error, and numbers that look as they should."""
    what: str
    file: str
    right: str
    wrong: str


BUGS = (
    Bug("test cells have a say in the normalisation of all others", "data.py",
        "median = float(np.median(totals[seen]))", "median = float(np.median(totals))"),
    Bug("the average forgets per update what it should forget per micro-batch", "train.py",
        "1 - s.ema**s.accumulate)  # [D8]", "1 - s.ema)  # [D8]"),
    Bug("the fresh oracle shares cells with the target", "tasks.py",
        "first, rest = order[:cells], order[cells:]", "first, rest = order[:cells], order"),
    Bug("the query can be among the experiments of its own context", "tasks.py",
        "rng.permutation(known[known != t])", "rng.permutation(known)"),
)


def copy(folder: Path) -> None:
    """All files of the repository, without what git ignores. Raises BadInput if this is no clone."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=HERE,
                            capture_output=True, text=True)
    if listed.returncode != 0:
        raise BadInput(f"{HERE}: git lists no files here ({listed.stderr.strip()}); a clone is needed, no archive")
    for name in filter(None, listed.stdout.split("\0")):
        if (HERE / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / name, folder / name)


def emptied(text: str) -> tuple[str, set[int]]:
    """A module whose exercises keep their signatures and docstrings only, and the numbers of these exercises."""
    lines, found = text.splitlines(), set()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda node: -node.lineno):  # from below, so that line numbers stay right
        above = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 2
        mark = MARK.match(lines[above]) if above >= 0 else None
        if not mark:
            continue
        found.add(int(mark[1]))
        docstring = node.body[0]  # every public function has one
        indent = " " * docstring.col_offset
        lines[docstring.end_lineno : node.end_lineno] = [f'{indent}raise NotImplementedError("exercise {mark[1]}: '
                                                         f'{node.name}, as its docstring says")']
    return "\n".join(lines) + "\n", found


def only_graders(text: str) -> str:
    """A file of tests without those that grade no exercise."""
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if "mark.exercise" not in "\n".join(lines[first - 1 : node.lineno]):
                del lines[first - 1 : node.end_lineno]
    return "\n".join(lines) + "\n"


def plant(folder: Path, bugs: tuple[Bug, ...]) -> None:
    """Raises BadInput if the line of a bug is no longer there."""
    for bug in bugs:
        file = folder / bug.file
        text = file.read_text()
        if text.count(bug.right) != 1:
            raise BadInput(f"{bug.file}: the line of the bug '{bug.what}' is there {text.count(bug.right)} times; "
                           "mend course.py:BUGS")
        file.write_text(text.replace(bug.right, bug.wrong))


def make(folder: Path) -> None:
    """The student's version. Raises BadInput if the folder is there already."""
    if folder.exists():
        raise BadInput(f"{folder}: is there already; give another folder")
    found: set[int] = set()
    with scales.atomic(folder) as temporary:
        copy(temporary)
        plant(temporary, BUGS)
        for name in KEPT_BACK:
            (temporary / name).unlink(missing_ok=True)
        for file in temporary.glob("*.py"):
            text, numbers = emptied(file.read_text())
            found |= numbers
            file.write_text(text)
        for file in (temporary / "tests").glob("test_*.py"):
            text = only_graders(file.read_text())
            file.write_text(text)
            if "def test_" not in text:
                file.unlink()
        rows = [line for line in (HERE / "COURSE.md").read_text().splitlines() if line.startswith("|")]
        rows = [line.rsplit("|", 2)[0] + "|" for line in rows]  # without what students get wrong
        (temporary / "EXERCISES.md").write_text("# Exercises\n\n" + "\n".join(rows) + "\n")
        readme = temporary / "README.md"
        readme.write_text(readme.read_text().replace("COURSE.md", "EXERCISES.md"))
        (temporary / "tests" / "test_hunt.py").write_text('"""Exercise 9: tests that find four planted bugs."""\n')
    if found != set(EXERCISES):
        raise BadInput(f"exercises {sorted(found)} are marked in the code, expected {list(EXERCISES)}")
    print(f"{folder}: the student's version, of {len(found)} exercises and a hunt for {len(BUGS)} bugs")


def tested(folder: Path, *words: str) -> tuple[int, str]:
    """Exit status of pytest in a folder, and its last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words], cwd=folder,
                          capture_output=True, text=True)
    return done.returncode, (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]


def check() -> None:
    """Raises BadInput unless each exercise passes here and fails in the student's version."""
    with tempfile.TemporaryDirectory() as place:
        student = Path(place) / "student"
        make(student)
        for number in EXERCISES:
            here, there = (tested(folder, "-m", f"exercise{number}", "tests") for folder in (HERE, student))
            print(f"exercise {number}: here {here[1]}; there {there[1]}", flush=True)
            if here[0] != 0 or there[0] != 1 or " passed" in there[1]:
                raise BadInput(f"exercise {number}: expected all tests to pass here and all to fail there")


def hunt(student: Path) -> None:
    """How many of the bugs the student's tests find; none counts if they fail on the right code."""
    tests = student / "tests" / "test_hunt.py"
    if not tests.is_file():
        raise BadInput(f"{tests}: no such file; exercise 9 asks for it")
    found = 0
    for bug in (None, *BUGS):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            copy(folder)
            plant(folder, (bug,) if bug else ())
            shutil.copy(tests, folder / "tests" / "test_hunt.py")
            status, last = tested(folder, "tests/test_hunt.py")
        if bug is None:
            print(f"on the right code: {last}", flush=True)
            if status != 0:
                raise BadInput("the tests fail on the right code, so that what they find is no bug")
        else:
            found += status == 1
            print(f"{'found' if status == 1 else 'not found'}: {bug.what}", flush=True)
    print(f"{found} of {len(BUGS)} bugs found")


def main() -> None:
    """As the words say."""
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder))
        case ["check"]:
            check()
        case ["hunt", folder]:
            hunt(Path(folder))
        case _:
            raise BadInput("expected make FOLDER, check, or hunt FOLDER; the head of course.py explains them")


if __name__ == "__main__":
    scales.run(main)
