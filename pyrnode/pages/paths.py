"""Particles in time: the paths of a flow's own samples, from the data to the base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrnode import particles
from pyrnode.errors import PyrnodeError
from pyrnode.flow import load
from pyrnode.pages.markup import Html, join, name, number, tag, text
from pyrnode.pages.markup import table as html_table
from pyrnode.pages.reading import Story
from pyrnode.runs import RunFolder

PARTICLES, TIMES = 150, 33
SHOWN = 6
"""Runs whose particles are shown."""

Paths = dict[str, Any]
_kept: dict[tuple[Any, ...], Paths | str] = {}
"""What was followed before, by the model's file as it was then: a page that is renewed follows nothing twice."""


def of_run(story: Story) -> Paths | str:
    """Times, and positions by time and particle; or why there are none, in words."""
    model = RunFolder(story.path).model
    try:
        about = model.stat()
    except OSError:
        return "no model has been written yet"
    key = (os.path.abspath(model), about.st_ino, about.st_mtime_ns, about.st_size)
    if key not in _kept:
        if len(_kept) > 8 * SHOWN:
            _kept.clear()
        _kept[key] = _followed(story)
    return _kept[key]


def _followed(story: Story) -> Paths | str:
    try:
        flow = load(story.path, engine="torch")
        if len(flow.event_shape) != 1:
            return "this flow is on images, whose particles have too many coordinates to be shown"
        if flow.context_dim:
            return "this flow is conditional: its paths depend on the context"
        samples = flow.sample(PARTICLES, seed=flow.config.seed)
        times, states = particles.particle_paths(flow, samples, TIMES)
    except PyrnodeError as error:
        return f"they could not be followed: {error}"
    except Exception as error:  # a fault here must not cost the page, ours or a library's
        return f"they could not be followed ({type(error).__name__}: {error})"
    z = np.asarray(states.detach().cpu().double())[..., :2]
    return {
        "times": [round(t, 6) for t in times.tolist()],
        "z": np.round(z, 3).tolist(),
        "of": flow.dim,
        "blocks": [block.end_time for block in flow.blocks],
        "straightness": particles.straightness(states),
        "variation": particles.speed_variation(states),
        "spread": [(float(z[i].mean()), float(z[i].std())) for i in range(0, TIMES, (TIMES - 1) // 4)],
    }


def section(stories: Sequence[Story]) -> tuple[Html, list[dict[str, Any]]]:
    """The tables and remarks on particles, and what the script draws, by run."""
    drawn, remarks, rows = [], [], []
    for number_, story in enumerate(stories[:SHOWN]):
        found = of_run(story)
        if isinstance(found, str):
            remarks.append(tag("li", name(story.label), ": ", found))
            continue
        drawn.append({"run": number_, **{key: found[key] for key in ("times", "z", "of", "blocks")}})
        spread = [f"{number(mean, 2)} ± {number(std, 3)}" for mean, std in found["spread"]]
        rows.append([name(story.label), number(found["straightness"]), number(100 * found["variation"], 2), *spread])
    if len(stories) > SHOWN:
        remarks.append(tag("li", f"Of {len(stories)} runs the first {SHOWN} are shown."))
    heads = ["Run", "Path length / distance", "Speed varies by, %", *(f"at {q} T" for q in ("0", "¼", "½", "¾", "1"))]
    caption = "Straight paths have 1, constant speed 0 %; then mean ± standard deviation of the positions on the way"
    table = html_table(heads, rows, caption=caption) if rows else text("")
    return join(table, tag("ul", *remarks, class_="note") if remarks else ""), drawn
