"""Part of stage 4, choices: learning rate, length and guidance of a training on few conditions, by leaving one out.

Paper: A.3, B.4, Table 7. A screen of real cells may have five training conditions, and a tenth of five is no validation
condition. So one after the other is left out (`tasks.folds`): a network is trained on the others, and at every one of
LENGTHS its loss on the one that was left out is noted. The rate whose mean loss over these folds is least after
FIRST_LOOK, and its best length, are what `train.py` then trains with, on all training conditions; the networks of the
folds at that length choose the weight of guidance, by RMSE, as everywhere (Table 7). Test conditions are never looked
at. Departure: D55.

`train.py --rates 1e-3 3e-4 ...` calls this; it reads a screen, and writes `choice.json` beside the model.
Laptop scale: two to five minutes a split on two CPU cores.

    F folds   L lengths   K context experiments   N cells   D genes
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

import devices
import metrics
import model
import sample
import scales
import tasks
import train
from tasks import VALIDATION, Screen, Task

LENGTHS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of a training, as shares of --updates
FIRST_LOOK = LENGTHS[:3]  # these tell which of several rates is tried to the end
PATIENCE = 2  # lengths in a row that bring nothing, after which longer ones are not tried
DRAWS = 2     # of cells, for each left-out condition, when guidance is chosen


class Fold(NamedTuple):
    """A network in training on all but one condition."""
    screen: Screen
    state: train.State
    held_out: Task


def snapshots(s: train.Settings, folder: Path, folds: list[Screen],
              shares: tuple[float, ...] = LENGTHS) -> dict[int, list[tuple[float, PyTree]]]:
    """Length -> for each fold, validation loss and EMA weights, with the learning rate of `s` held after its warm-up.

    Longer ones are no longer tried once the mean loss over folds has not fallen for PATIENCE lengths.
    """
    s = dataclasses.replace(s, decay=0.0)
    (mesh, everywhere, shared), running, found = devices.shardings(), [], {}
    for screen in folds:
        state, static = train.begin(s, folder, screen)
        running.append(Fold(screen, devices.placed(state, everywhere), train.validation_tasks(s, screen)))
    update, validate = train.make_update(s, static, mesh), train.make_validation(s, static)
    key, done = scales.key("updates", s.seed), 0
    lengths = sorted({max(1, round(share * s.updates)) for share in shares})
    label = f"{folder.parent.name}/{folder.name}, rate {s.learning_rate:g}, {len(folds)} folds"
    bar = tqdm(total=lengths[-1], unit="update", desc=label, mininterval=2)
    for length in lengths:
        found[length] = []
        for number, fold in enumerate(running):
            state = fold.state
            for i in range(done, length):
                batches = devices.placed(train.update_tasks(s, fold.screen, i), shared)
                state, loss, _ = update(state, batches, key)
                loss.block_until_ready()  # folds do not wait for each other, but they share the devices
            running[number] = fold._replace(state=state)
            # A copy: the update gives the memory of its argument to its result.
            weights = jax.tree.map(np.array, train.averaged(s, devices.here(state)))
            found[length].append((validate(devices.here(state), fold.held_out), weights))
        bar.update(length - done)
        done = length
        losses = mean_losses(found)
        if list(losses).index(min(losses, key=losses.get)) < len(losses) - PATIENCE:
            break
    bar.close()
    return found


def mean_losses(found: dict[int, list[tuple[float, PyTree]]]) -> dict[int, float]:
    """Length -> mean validation loss over the folds; infinite if a network has diverged."""
    means = {}
    for length, each in found.items():
        means[length] = float(np.nan_to_num(np.mean([loss for loss, _ in each]), nan=np.inf))
    return means


def guidance_errors(s: train.Settings, folds: list[Screen], networks: list[eqx.Module], steps: int,
                    cells: int) -> dict[float, float]:
    """RMSE of each weight of Table 7 on the left-out conditions, each predicted by the network that never saw it."""
    errors = {weight: [] for weight in sample.GUIDANCE}
    for screen, network in zip(folds, networks):
        for draw in range(DRAWS):
            e = tasks.evaluation_tasks(screen, cells, s.context, s.seed, draw, VALIDATION)
            for weight in errors:
                predicted = sample.generate(network, e.given, weight, steps, key=scales.key("validation", s.seed, draw))
                predicted, _ = sample.clip_expression(predicted, screen.log_expression)
                errors[weight] += [metrics.rmse(*pair) for pair in zip(e.target, predicted)]
    return {weight: float(np.mean(values)) for weight, values in errors.items()}


def choose(s: train.Settings, folder: Path, screen: Screen) -> dict:
    """What `choice.json` holds: `updates`, `learning_rate`, `guidance`, the losses and errors that they come from, and
    the seconds that it took.

    Raises BadInput if the screen has too few training conditions to leave one out.
    """
    folds, started = tasks.folds(screen), time.perf_counter()
    if not folds:
        raise scales.BadInput(f"{folder}: too few training conditions to leave one out; train without --rates")
    s = dataclasses.replace(s, context=min(s.context, *map(tasks.most_context, folds)))
    rate, losses = s.rates[0], {}
    if len(s.rates) > 1:
        for rate in s.rates:
            run = dataclasses.replace(s, learning_rate=rate)
            losses[rate] = mean_losses(snapshots(run, folder, folds, FIRST_LOOK))
        rate = min(losses, key=lambda rate: min(losses[rate].values()))
    found = snapshots(dataclasses.replace(s, learning_rate=rate), folder, folds)
    losses[rate] = mean_losses(found)
    length = min(losses[rate], key=losses[rate].get)
    if not np.isfinite(losses[rate][length]):
        raise scales.BadInput(f"{folder}: no rate of --rates {s.rates} trains to a finite loss; give lower ones")
    choice = {"updates": length, "learning_rate": rate, "stopped": length < max(losses[rate]), "folds": len(folds),
              "validation_loss": losses}
    evaluate = scales.at(s.scale, "evaluate")
    if evaluate.get("guidance") is not None:  # fixed at this scale
        return choice | {"guidance": None, "seconds": round(time.perf_counter() - started, 1)}
    static = train.begin(s, folder, screen)[1]
    networks = [eqx.combine(weights, static) for _, weights in found[length]]
    errors = guidance_errors(s, folds, networks, evaluate.get("steps", sample.Settings.steps),
                             evaluate.get("eval_cells", sample.Settings.eval_cells))
    return choice | {"guidance": min(errors, key=errors.get), "validation_rmse": errors,
                     "seconds": round(time.perf_counter() - started, 1)}


def chosen(s: train.Settings, folder: Path, screen: Screen) -> dict:
    """The content of `choice.json`, which is made if it is not there. Raises BadInput if it is of other settings."""
    path = folder / "choice.json"
    if s.choice:
        path = model.run_folder(s, s.choice, tasks.split_number(folder)) / "choice.json"
    made = train.header(dataclasses.replace(s, seed=0, init=""), folder, screen)
    made |= {"rates": s.rates, "lengths": LENGTHS, "first look": FIRST_LOOK, "folds": len(tasks.folds(screen)),
             "evaluate": scales.at(s.scale, "evaluate"), "fine-tuning": bool(s.init)}
    if s.init and not s.choice:
        made["weights"] = train.header(s, folder, screen)["weights"]
    choice = scales.read_json(path)
    if choice:
        scales.check_made(path, {name: choice.get("made", {}).get(name) for name in made}, made)
        return choice
    if s.choice:
        raise scales.BadInput(f"--choice {s.choice}: no {path}, or it is damaged; train that run first")
    choice = choose(s, folder, screen) | {"made": made, "revision": scales.revision()}
    with scales.atomic(path) as temporary:
        temporary.write_text(json.dumps(choice, default=str))
    print(f"{path}: {choice['updates']} updates at {choice['learning_rate']:g}, guidance {choice['guidance']}",
          flush=True)
    return choice
