"""Claims about what goes wrong: numbers that cannot be meant, flipped bits, full disks, two runs in one folder. Each
ends in one line that names what is wrong and how to mend it; no half-written file, no silent nonsense."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metrics
import model
import prior
import scales
import tasks
from scales import BadInput
from tests.test_tasks import make_screen, save

ROOT = Path(__file__).parents[1]
SCRIPTS = {"prior": ["linear"], "data": [], "train": [], "sample": [], "baselines": [], "figures": [], "tables": [],
           "costs": [], "answer": [], "predict": ["screen.h5ad"]}  # and what each has to be told at least
# What odd values can be meant; all others are refused.
CAN_BE_MEANT = {
    "0": {"seed", "validation", "test", "registers", "context", "target_cells", "mean_loss", "warmup", "decay",
          "drop_condition", "no_knock_out", "ema", "b1", "b2", "weight_decay", "checkpoint_seconds", "snapshots",
          "process", "guidance", "fresh", "weights", "contexts", "toy_treatments", "dropout", "shard"},
    "-1": {"shard"},
    "nan": set(),
    "1e30": set(),
    "1000000000000": set(),
}


def numbers(script: str) -> list[dataclasses.Field]:
    """Settings of a script that are numbers, or several."""
    found = []
    for field in dataclasses.fields(importlib.import_module(script).Settings):
        if "int" in str(field.type) or "float" in str(field.type) or isinstance(field.default, (int, float, tuple)):
            if not isinstance(field.default, bool) and "str" not in str(field.type):
                found.append(field)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_every_command_line(script, capsys):
    """0, -1, not a number and numbers that are far too large: refused by name with status 1 or 2, but for those that
    can be meant. One place checks them all."""
    settings, asked = importlib.import_module(script).Settings, SCRIPTS[script]
    for field in numbers(script):
        flag = f"--{field.name.replace('_', '-')}"
        for value, fine in CAN_BE_MEANT.items():
            given = [value] * (2 if field.name == "dropout" else 1)
            try:
                scales.parse(settings, lambda s: (), [*asked, flag, *given])
            except BadInput as error:
                assert field.name not in fine and str(error).startswith(f"{flag} "), (flag, value)
            except SystemExit as stop:  # not a number of the kind that is expected: tyro says so
                assert stop.code == 2 and flag in capsys.readouterr().err, (flag, value)
            else:
                assert field.name in fine, (flag, value)


@pytest.mark.parametrize("script", ["prior", "data", "train", "sample", "baselines", "figures", "answer"])
def test_nothing_is_written_elsewhere(script):
    """Names of folders are names: with a slash in them they are refused."""
    settings = importlib.import_module(script).Settings
    for name in set(scales.PLACES) & {field.name for field in dataclasses.fields(settings)}:
        for value in ("../../up", "/tmp/there", ".."):
            with pytest.raises(BadInput, match="name of a folder"):
                scales.parse(settings, lambda s: (), [*SCRIPTS[script], f"--{name}", value])


# ------------------------------------------------------------------------------------------------------- flipped bytes


def flipped(path: Path, where: float) -> None:
    """One bit of the file is another."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["cells.npy", "conditions.npz", "screen.json"])
@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.7, 0.97])
def test_a_flipped_bit_of_a_screen_is_found(tmp_path, file, where):
    save(tmp_path / "split-0", make_screen())
    tasks.load_screen(tmp_path / "split-0")
    flipped(tmp_path / "split-0" / file, where)
    with pytest.raises(BadInput, match="split-0: not a complete screen.*delete it and make it again"):
        tasks.load_screen(tmp_path / "split-0")


@pytest.mark.parametrize("where", [0.0, 0.01, 0.2, 0.5, 0.8, 1.0])
def test_a_flipped_bit_of_a_model_is_found(trained, tmp_path, where):
    path = tmp_path / "model.eqx"
    path.write_bytes((trained.folder / "model.eqx").read_bytes())
    model.load_model(path)
    flipped(path, where)
    with pytest.raises(BadInput, match="model.eqx: not a checkpoint.*delete it to train anew"):
        model.load_model(path)


@pytest.mark.parametrize("where", [0.01, 0.2, 0.5, 0.8, 0.99])
def test_a_flipped_bit_of_a_prediction_is_found(tmp_path, rng, where):
    cells = rng.normal(size=(2, 5, 3)).astype(np.float32)
    p = metrics.Predictions(cells, cells, cells, cells, np.eye(3, dtype=np.float32)[:2], np.zeros((2, 3), np.float32),
                            np.array(["s", "s"]), True, {"row": "identity"})
    path = tmp_path / "row.npz"
    metrics.save_predictions(path, p)
    before = metrics.load_predictions(path)
    flipped(path, where)
    try:
        after = metrics.load_predictions(path)
    except BadInput as error:
        assert "row.npz: " in str(error) and "write it again" in str(error)
    else:  # of a .npz some bytes say nothing, such as dates
        for name in ("controls", "source", "target", "prediction", "treatments", "meta"):
            assert np.array_equal(getattr(before, name), getattr(after, name))


# --------------------------------------------------------------------------------------- two at once, and a full disk


def test_the_second_of_two_runs_refuses(tmp_path):
    """While a process makes a folder, another one that wants to make it says so, and writes nothing. Once the first has
    gone, even killed, the way is free."""
    first = subprocess.Popen([sys.executable, "-c", "import scales, sys, time\nwith scales.alone(sys.argv[1]):\n"
                              "    print('here', flush=True); time.sleep(60)", tmp_path / "split-0"],
                             cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "here\n"
    with pytest.raises(BadInput, match="split-0: another process is making it"):
        with scales.alone(tmp_path / "split-0"):
            pass
    first.kill()
    first.wait()
    with scales.alone(tmp_path / "split-0"):
        assert not (tmp_path / "split-0").exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Its temporary file, by whoever writes that file next; not that of a process that runs, nor the user's own."""
    script = ("import os, scales, sys\n"
              "with scales.atomic(sys.argv[1]) as path: path.write_text('half'); os.kill(os.getpid(), 9)")
    killed = subprocess.Popen([sys.executable, "-c", script, tmp_path / "a.txt"], cwd=ROOT)
    killed.wait()
    left, other = (tmp_path / f".{process}.partial.a.txt" for process in (killed.pid, os.getppid()))
    mine = tmp_path / ".2024.a.txt"
    for path in (other, mine):
        path.write_text("half")
    assert left.is_file()
    with scales.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert not left.exists() and other.is_file() and mine.is_file()


def test_two_priors_at_once(tmp_path):
    s = prior.Settings("linear", scale="smoke", systems=8, out=tmp_path)
    words = ["prior.py", "linear", "--scale", "smoke", "--systems", "8", "--out", str(tmp_path)]
    with scales.alone(prior.screen_folder(s)):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "another process is making it" in done.stderr and "Traceback" not in done.stderr
    assert not prior.screen_folder(s).exists()


@pytest.mark.parametrize("command", [
    "prior.py grn --systems 2 --validation 1 --test 1", "prior.py linear --systems 20", "data.py --dataset toy",
    "train.py --screen dags --updates 2 --width 64 --heads 2 --depth 2",
    "sample.py --screen dags --model dags", "answer.py --screen dags --model dags --query gene0 --told gene1",
    "-m baselines --screen dags --methods identity", "tables.py", "predict.py toy --query gene03 --cells 9 --draws 1"])
def test_a_full_disk_leaves_nothing(tmp_path, trained, command):
    """No file can have more than 4 blocks: a last line says so, the status is 1, and nothing is left half-written."""
    (tmp_path / "smoke" / "screens").mkdir(parents=True)
    (tmp_path / "smoke" / "screens" / "dags").symlink_to(trained.settings.out / "smoke" / "screens" / "dags")
    if "--model" in command:
        (tmp_path / "smoke" / "train").symlink_to(trained.settings.out / "smoke" / "train")
    place = ["--scale", "smoke", "--out", str(tmp_path)]
    if "predict" in command:
        place = ["--out", str(tmp_path / "predicted.h5ad")]
    limited = ["sh", "-c", 'ulimit -f 4; exec "$@"', "sh", sys.executable, *command.split(), *place]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "File too large" in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".lock", ".csv")]
    assert not [path for path in files if path.stat().st_size >= 4 * 512]  # csv: the log of a training, line by line
    assert not list(tmp_path.rglob(".*.partial.*"))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": ', "\x00\x01"])
def test_a_damaged_cache_is_made_again(tmp_path, content, capsys):
    """What can be computed anew counts as not there, and a line says so."""
    path = tmp_path / "choice.json"
    assert scales.read_json(path) == {} and not capsys.readouterr().out
    path.write_text(content)
    assert scales.read_json(path) == {} and "choice.json: damaged; it is made again" in capsys.readouterr().out
    path.write_text('{"a": 1}')
    assert scales.read_json(path) == {"a": 1}
