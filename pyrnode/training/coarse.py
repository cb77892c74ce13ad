"""What ``solver.precision = "auto"`` is for a run: by its device, the memory that has, and its settings."""

from __future__ import annotations

import math
from dataclasses import replace

from pyrnode import precision
from pyrnode.config import Config, Precision, SolverConfig
from pyrnode.devices import store_limit
from pyrnode.dynamics.coarse import coarsened
from pyrnode.engines.pytorch import evaluations
from pyrnode.errors import ConfigError
from pyrnode.flow import Flow
from pyrnode.training.ladder import Ladder
from pyrnode.training.step import estimator


def settled(flow: Flow, config: Config, batch: int) -> Precision:
    """In which numbers a run is trained, with batches of so many samples on the flow's device.

    What the settings say. Where that is ``"auto"``: TF32 where that is faster; bfloat16 where it alone lets a block's
    intermediates be stored in the device's memory, so that they are not computed again; and IEEE's numbers everywhere
    else, also where coarser ones mean nothing.

    Args:
        flow: The flow, where it is trained.
        config: Settings.
        batch: Samples of a step in this process.
    """
    if config.solver.precision != "auto":
        return config.solver.precision
    if not precision.gains(flow.reference.device):
        return "ieee"
    solver = Ladder(config.solver, config.flow.end_time, config.training.tolerance)[0]
    coarse = replace(solver, precision="tf32")
    try:
        replace(config, solver=replace(config.solver, precision="tf32"))  # it looks for what it means nothing beside
        flow.engine.check(coarse)
        for block in flow.blocks:
            coarsened(block.dynamics.bind(), "tf32")
    except ConfigError:
        return "ieee"
    if solver.memory == "auto" and not _stored(flow, config, solver, batch, "tf32"):
        return "bf16" if _stored(flow, config, solver, batch, "bf16") else "tf32"
    return "tf32"


def _stored(flow: Flow, config: Config, solver: SolverConfig, batch: int, numbers: Precision) -> bool:
    """Whether the intermediates of all blocks, one after the other, are stored."""
    divergence, taken = estimator(flow, config.penalties), 0
    for block in flow.blocks:
        event = block.dynamics.event_shape
        z = flow.reference.new_empty(batch * flow.transform.turns, *event, device="meta")
        probes = math.prod(event) if divergence.kind == "exact" else divergence.probes or 1
        bound = coarsened(block.dynamics.bind(), numbers)
        size = evaluations((0.0, block.end_time), solver) * bound.tape_bytes(z, probes)
        if size > store_limit(flow.reference, 0, taken=taken):
            return False
        taken += size
    return True
