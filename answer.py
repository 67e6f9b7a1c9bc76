"""A picture of one answer: what a model predicts of a knock-out when another experiment of the context tells it.

Beyond the paper (D57). Reads `screens/<screen>/` and `train/<run>/` below out/<scale>; writes
`figures/answer-<query>.png` there, drawn as those of figures.py are.

    python answer.py --screen leukemia --model exchangeable-panel-seed0 --query JAK2 --told IFNGR2
(seconds) In leukemia cells the receptor IFNGR2 and the kinase JAK2 are steps of one pathway, and knocking out either
does nearly the same: who sees one of them among the experiments could know the other.

    panels: what the two knock-outs do, gene by gene; what is predicted of the query with that experiment among the K of
    the context; and with control cells in the place of all of them
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

import drawing
import model
import sample
import scales
import tasks
from drawing import Panel
from scales import BadInput
from tasks import CONTROL, KNOWN, TEST, Screen


@dataclass(frozen=True)
class Settings(tasks.EvaluationSettings):
    """Draw one answer."""
    model: str = ""  # run of train.py
    query: str = "JAK2"  # knock-out that is asked for; a test condition of some split
    told: str = "IFNGR2"  # knock-out that is to be in the context, known in the same split
    steps: int = 25


def find(s: Settings) -> tuple[int, Screen, int, int]:
    """Split, screen, system and treatment of the query where `told` is known. Raises BadInput if there is none."""
    for folder in tasks.splits(s):
        screen = tasks.load_screen(folder)
        names = list(screen.treatment_names)
        for name in (s.query, s.told):
            if name not in names:
                raise BadInput(f"{name}: not among the treatments of {s.screen}: {', '.join(names[1:])}")
        asked, told = names.index(s.query), names.index(s.told)
        usable = (screen.split[:, asked] == TEST) & np.isin(screen.split[:, told], KNOWN)
        if usable.any():
            return tasks.split_number(folder), screen, int(np.flatnonzero(usable)[0]), asked
    raise BadInput(f"no split of {s.screen} has {s.query} as a test condition and {s.told} as a known one; name others")


def given_of(s: Settings, screen: Screen, system: int, asked: int, context: int) -> tasks.Given:
    """The task, with `told` first and K - 1 other known experiments, without a batch axis."""
    told = screen.treatment_names.index(s.told)
    rng = scales.generator("figure", s.seed)
    others = tasks.experiments(rng, screen, system, asked, len(screen.treatment_names))
    chosen = [told, *others[others != told].tolist()][:context]
    pools = [screen.pool(system, t) for t in (CONTROL, *chosen)]
    cells = np.stack([pool[tasks.draw(rng, len(pool), s.eval_cells)] for pool in pools])
    return tasks.Given(cells[0], cells[1:], screen.treatments[system, chosen], screen.treatments[system, asked])


def change(screen: Screen, system: int, treatment: int) -> Float[np.ndarray, "D"]:
    """Of each gene's mean, over all cells there are."""
    return screen.pool(system, treatment).mean(axis=0) - screen.pool(system, CONTROL).mean(axis=0)


def main() -> None:
    """Predict and draw."""
    s = scales.parse(Settings, lambda s: (tasks.section_of(s), "evaluate"))
    split, screen, system, asked = find(s)
    head, network = model.load_model(model.model_file(s, s.model, s.screen, split))
    given = given_of(s, screen, system, asked, min(head["context"], sample.most_experiments(screen)))
    batch = tasks.Given(*(field[None] for field in given))
    true, told = change(screen, system, asked), change(screen, system, screen.treatment_names.index(s.told))
    panels = [Panel(f"true, of both: r = {np.corrcoef(told, true)[0, 1]:.2f}", f"do({s.query}): change of the mean",
                    f"do({s.told})", true.tolist(), {"equal": [true.tolist()], "genes": [told.tolist()]})]
    source = batch.controls if head.get("no_knock_out") else None
    for title, task in ((f"with do({s.told}) in the context", batch),
                        ("with control cells as context", sample.uninformed(batch, "controls"))):
        cells = sample.generate(network, task, 1.0, s.steps, source=source, key=scales.key("figure", s.seed))
        cells, _ = sample.clip_expression(cells, screen.log_expression)
        found = (cells[0].mean(axis=0) - given.controls.mean(axis=0)).tolist()
        error = np.sqrt(np.mean((np.array(found) - true) ** 2))
        panels.append(Panel(f"{title}: RMSE {error:.3f}", f"do({s.query}): change of the mean", "predicted",
                            true.tolist(), {"equal": [true.tolist()], "genes": [found]}))
    document = {"title": f"do({s.query}), predicted by {s.model}, split {split}, K = {len(given.context)}",
                "data": {"panels": [panel._asdict() for panel in panels]}}
    path = s.out / s.scale / "figures" / f"answer-{s.query}.png"
    drawing.draw(document, s.scale, path)
    print(*(panel.title for panel in panels), f"written to {path}", sep="\n")


if __name__ == "__main__":
    scales.run(main)
