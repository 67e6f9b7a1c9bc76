"""Claims about tasks.folds and choose.py: what rate, length and guidance are chosen on, and that nothing else is."""

import dataclasses

import numpy as np
import pytest
from conftest import write_linear

import choose
import model
import tasks
import train
from scales import BadInput
from tasks import KNOWN_ONLY, TEST, TRAIN, VALIDATION


@pytest.fixture
def settings(tmp_path, like):
    """Training on one system of five treatments, of which none is for validation."""
    write_linear(tmp_path / "laptop" / "screens" / "five", systems=1, validation=0, test=1)
    return like(scale="laptop", screen="five", name="five", rates=(3e-3, 1e-3), updates=64, context=4, depth=1,
                skip=False, out=tmp_path)


@pytest.fixture
def place(settings):
    """Folder of the run, and the screen."""
    folder, = tasks.splits(settings)
    return model.run_folder(settings, "five", 0), tasks.load_screen(folder)


def test_each_training_condition_is_left_out_once(place, trained):
    """It is for validation in one fold, known in the others; the others of its system and the test conditions stay. A
    screen that has validation conditions is its only fold."""
    _, screen = place
    folds = tasks.folds(screen, 99)
    left_out = [tuple(np.argwhere(fold.split == VALIDATION)[0]) for fold in folds]
    assert sorted(left_out) == sorted(map(tuple, np.argwhere(screen.split[:, 1:] == TRAIN) + [0, 1]))
    for fold, where in zip(folds, left_out):
        changed = fold.split != screen.split
        assert changed.sum() == 1 and changed[where] and (fold.split == VALIDATION).sum() == 1
    assert (screen.split == TEST).any() and (screen.split == KNOWN_ONLY).any()
    assert [tasks.most_context(fold) for fold in folds] == [3] * 5
    three = [fold.split.tolist() for fold in tasks.folds(screen)]
    assert three == [folds[i].split.tolist() for i in (0, 2, 4)]
    assert tasks.folds(trained.screen) == [trained.screen] and tasks.most_context(screen) == 4


def test_the_least_loss_and_error_are_chosen(settings, place):
    """The chosen rate has the least loss of the first look, the chosen length the least of its own, the chosen guidance
    the least error. The test conditions' cells have no say."""
    folder, screen = place
    settings = dataclasses.replace(settings, updates=32)
    choice = choose.choose(settings, folder, screen)
    losses = choice["validation_loss"]
    assert losses.keys() == {3e-3, 1e-3} and choice["folds"] == 3
    rate, at = choice["learning_rate"], losses[choice["learning_rate"]]
    assert at[choice["updates"]] == min(at.values())
    shorter = losses[{3e-3: 1e-3, 1e-3: 3e-3}[rate]]
    assert min(at[length] for length in shorter) == min(min(shorter.values()), *(at[length] for length in shorter))
    assert choice["guidance"] == min(choice["validation_rmse"], key=choice["validation_rmse"].get)
    cells = np.array(screen.cells)
    for s, t in np.argwhere(screen.split == TEST).tolist():
        cells[screen.start[s, t] : screen.start[s, t] + screen.count[s, t]] = np.nan
    again = choose.choose(settings, folder, dataclasses.replace(screen, cells=cells))
    assert again | {"seconds": choice["seconds"]} == choice


def test_no_more_experiments_than_there_are(settings, place, capsys):
    """K is as large as the screen allows, and the user is told; what it allows is left alone."""
    folder, screen = place
    s, about = train.settled(dataclasses.replace(settings, context=8, rates=()), folder, screen)
    assert s.context == 4 and about == {} and "K = 4 instead of 8" in capsys.readouterr().out
    assert train.settled(s, folder, screen) == (s, {}) and not capsys.readouterr().out


def test_what_brings_nothing_stops(settings, place, monkeypatch):
    """Once the loss has not fallen for PATIENCE lengths, longer ones are not tried."""
    folder, screen = place
    least_at_four = lambda state, batch: float(abs(int(state.update) - 4))
    monkeypatch.setattr(choose.train, "make_validation", lambda *a: least_at_four)
    found = choose.snapshots(dataclasses.replace(settings, context=3), folder, tasks.folds(screen))
    assert list(found) == [2, 4, 8, 16]


def test_a_choice_is_kept_and_used_again(settings, place, monkeypatch):
    """It is made once; another seed's run uses it by name; other settings are refused by name; a damaged file is made again."""
    folder, screen = place
    made = {"updates": 7, "learning_rate": 1e-3, "guidance": 1.5, "seconds": 3.0}
    monkeypatch.setattr(choose, "choose", lambda *a: made)
    assert made.items() <= choose.chosen(settings, folder, screen).items()
    monkeypatch.delattr(choose, "choose")
    again = dataclasses.replace(settings, seed=1, name="six", choice="five")
    six = model.run_folder(again, "six", 0)
    assert made.items() <= choose.chosen(again, six, screen).items() and not (six / "choice.json").exists()
    with pytest.raises(BadInput, match="choice.json was made with other settings .width"):
        choose.chosen(dataclasses.replace(settings, width=32), folder, screen)
    with pytest.raises(BadInput, match="--choice seven: no .*choice.json"):
        choose.chosen(dataclasses.replace(again, choice="seven"), six, screen)
    (folder / "choice.json").write_text("{")
    monkeypatch.setattr(choose, "choose", lambda *a: made | {"updates": 8}, raising=False)
    assert choose.chosen(settings, folder, screen)["updates"] == 8
