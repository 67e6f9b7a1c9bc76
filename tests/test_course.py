"""Claims about course.py: what a student gets, and what the hunt grades. (`course.py check` runs the exercises.)"""

import ast

import pytest

import course
from scales import BadInput

MODULE = '''"""A module."""


def kept(x):
    """Stays."""
    return x + 1


# Exercise 3
@decorated
def asked(x: int,
          y: int = 2) -> int:
    """Returns x + y.

    In full.
    """
    total = x + y
    return total


class Thing:
    # Exercise 4
    def method(self):
        """Returns 1."""
        return 1
'''


def test_exercises_lose_their_bodies_and_nothing_else():
    text, numbers = course.emptied(MODULE)
    assert numbers == {3, 4} and "return x + 1" in text and "total" not in text and "return 1" not in text
    assert "In full." in text and "y: int = 2) -> int:" in text and text.count("NotImplementedError") == 2
    ast.parse(text)
    unmarked = MODULE.replace("# Exercise", "# An exercise")
    assert course.emptied(unmarked) == (unmarked, set())


def test_students_keep_the_tests_that_grade_them():
    tests = 'import pytest\n\n\ndef helper():\n    pass\n\n\n@pytest.mark.exercise3\n@pytest.mark.parametrize("a", [1])\n' \
            'def test_asked(a):\n    pass\n\n\n@pytest.mark.parametrize("b", [1])\ndef test_other(b):\n    pass\n'
    text = course.only_graders(tests)
    assert "test_asked" in text and "helper" in text and "other" not in text and '"b"' not in text


def test_every_bug_can_be_planted(tmp_path):
    """Its line is there once, and the code with it is still code; a line that has gone is named."""
    course.copy(tmp_path)
    course.plant(tmp_path, course.BUGS)
    for bug in course.BUGS:
        ast.parse((tmp_path / bug.file).read_text())
    with pytest.raises(BadInput, match="is there 0 times; mend course.py:BUGS"):
        course.plant(tmp_path, course.BUGS[:1])


def test_every_exercise_is_marked_and_graded(tmp_path):
    course.make(tmp_path / "student")
    tests = "".join(file.read_text() for file in (tmp_path / "student" / "tests").glob("test_*.py"))
    assert all(f"@pytest.mark.exercise{number}\n" in tests for number in course.EXERCISES)
    assert not any((tmp_path / "student" / name).exists() for name in course.KEPT_BACK)
    asked = (tmp_path / "student" / "EXERCISES.md").read_text()
    assert "| 10 | open:" in asked and "they choose on test conditions" not in asked
    with pytest.raises(BadInput, match="there already"):
        course.make(tmp_path / "student")
