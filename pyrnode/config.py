"""Every setting of a run: frozen dataclasses that validate themselves and round-trip through TOML.

`Config` is the whole of it. Its sections are the tables of the TOML file; a key is named ``section.key``, or just
``key`` alone, which is the outermost setting of that name::

    >>> config = Config.preset("digits").override({"epochs": 3, "step_size": 0.5})
    >>> config.training.epochs, config.solver.step_size
    (3, 0.5)
    >>> Config.from_toml(config.to_toml()) == config
    True
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w

from pyrnode.architecture import FlowConfig
from pyrnode.columns import ColumnsConfig
from pyrnode.errors import ConfigError, unknown_name
from pyrnode.optimisation import TrainingConfig
from pyrnode.settings import Section, at_least, shown

CHUNK = 500
"""Samples per solve where a flow is used."""

EXACT_LIMIT = 64
"""Up to how many dimensions the divergence ``"auto"`` is the exact trace."""

EXACT_TRAINING = 2
"""The same in training, where an evaluation with one probe is cheaper, and what it scatters is averaged away."""

WIDE = 48
"""From how many columns on a table has a wider network (docs/training.md)."""

Engine = Literal["auto", "torch", "julia"]
Precision = Literal["ieee", "tf32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What is learned, and how it is split.

    Args:
        name: Name of a data set, or the path of a file or folder; ``""`` when arrays are handed over in Python.
        dir: Folder that holds downloaded data sets; default the environment variable ``PYRNODE_DATA``.
        levels: Grey levels of discrete data; `None` takes the source's own.
        validation: Share of the training samples held out for model selection, in (0, 1).
        test: Share held out for the final report where the source has no test set of its own, in (0, 1).
        split_seed: Seed of the split; independent of the training seed.
        samples: Number of samples drawn from a synthetic density (train, validation and test together).
        limit: Use at most this many training samples (for quick runs).
        flip: Random horizontal flips in training (images).
        workers: Loader processes for torch data sets (started with ``spawn``); 0 loads in this process.
        sep: What separates the fields of a ``.csv`` or ``.tsv`` file (a blank: any run of blanks); ``"auto"``
            recognises comma, semicolon, tab and bar.
        decimal: Its decimal mark; ``"auto"`` recognises it.
        header: Whether its first line has the names of the columns; ``"auto"`` recognises it. What can be read in two
            ways is refused, and one of these three decides.
    """

    name: str = ""
    dir: str | None = None
    levels: int | None = None
    validation: float = 0.1
    test: float = 0.1
    split_seed: int = 0
    samples: int = 20_000
    limit: int | None = None
    flip: bool = False
    workers: int = 0
    sep: str = "auto"
    decimal: str = "auto"
    header: bool | Literal["auto"] = "auto"

    def _validate(self) -> None:
        at_least(self, 2, "levels")
        at_least(self, 10, "samples", "limit")
        at_least(self, 0, "workers", "split_seed")
        if self.sep not in ("auto", ",", ";", "\t", "|", " "):
            raise ConfigError(f"sep = {self.sep!r}: expected 'auto' or one of ',', ';', '\\t', '|' and ' '")
        if self.decimal not in ("auto", ".", ","):
            raise ConfigError(f"decimal = {self.decimal!r}: expected 'auto', '.' or ','")
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 0.9:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected a share between 0 and 0.9")


@dataclass(frozen=True, kw_only=True)
class SolverConfig(Section):
    """How a block is integrated, under DifferentialEquations.jl's names.

    A bare word where a solver is expected is its name.

    Args:
        name: Solver, e.g. ``"RK4"`` or ``"DP5"``; see ``pyrnode solvers``. ``"auto"``, in training alone, is one step
            of RK4 a block, or DP5's formula in 1, 2, 4 … 64 steps, whichever is the first that is right
            (`TrainingConfig.tolerance`); with a step of your own, RK4.
        step_size: Step of a fixed-step solver in units of time. ``"auto"``, in training alone: one step a block, and
            twice as many whenever a finer solve disagrees (`TrainingConfig.tolerance`). Adaptive solvers ignore
            it.
        adaptive: Whether a solver with an error estimate chooses its own steps; false takes its formula along the grid
            of `step_size` (PyTorch).
        rtol: Relative tolerance of an adaptive solver.
        atol: Absolute tolerance of an adaptive solver.
        error_control: What an adaptive solver's step answers for: the state and the log-determinant (``"density"``), or
            the penalties' integrals too (``"all"``).
        maxiters: Bound on the steps that a solver chooses in one solve; fixed steps are as many as they are.
        sensealg: Sensitivity algorithm, under SciMLSensitivity's names, or ``"Backprop"``; ``"auto"`` takes Backprop in
            PyTorch, and in Julia InterpolatingAdjoint for fixed steps, else GaussAdjoint (docs/julia.md).
        memory: What ``Backprop`` keeps of the forward solve: every intermediate (``"store"``), only the state at each
            evaluation (``"checkpoint"``: memory does not grow with the number of steps), or by size (``"auto"``).
        precision: In which numbers the networks of a training step of fixed steps are computed: float32 by IEEE's rules
            (``"ieee"``), or with what their products read and keep in TF32 or bfloat16 (docs/gpu.md). ``"auto"`` is
            TF32 where a GPU has tensor cores for it and the other settings allow it, bfloat16 where a block's
            intermediates can only thus be stored in its memory, and else IEEE's. Scores, samples, validation and
            whatever else is not the training step are IEEE's, whatever stands here.
        graphs: Whether a solve of fixed steps that is trained through is recorded as CUDA graphs: wherever that can be
            (``"auto"``), or never (false).
        options: Further keyword options of the solver, passed on by the Julia engine, which names what it lacks.
    """

    name: str = "RK4"
    step_size: float | Literal["auto"] = 0.25
    adaptive: bool = True
    rtol: float = 1e-5
    atol: float = 1e-5
    error_control: Literal["density", "all"] = "density"
    maxiters: int = 10_000
    sensealg: str = "auto"
    memory: Literal["auto", "store", "checkpoint"] = "auto"
    precision: Precision | Literal["auto"] = "ieee"
    graphs: Literal["auto", False] = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    _bare_word = "name"

    @classmethod
    def _in_full(cls, word: str) -> dict[str, Any]:
        return {"name": "auto", "step_size": "auto"} if word == "auto" else super()._in_full(word)

    def _validate(self) -> None:
        at_least(self, 0, "step_size", "rtol", "atol", strict=True)
        at_least(self, 1, "maxiters")
        if self.name == "auto" and self.step_size != "auto":
            object.__setattr__(self, "name", "RK4")

    @property
    def numbers(self) -> Precision:
        """Its precision; IEEE's where that is ``"auto"`` and training has not settled it."""
        return "ieee" if self.precision == "auto" else self.precision

    def computing_in(self, precision: Precision) -> SolverConfig:
        """The same solver in those numbers."""
        return self if self.precision == precision else replace(self, precision=precision)


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig(Section):
    """The regularisation and the estimator of the divergence (docs/design.md §2; eq. 17 of the paper).

    Args:
        kinetic: ``λ_K`` on ``∫‖f‖²``; ``"auto"`` is 0.01 for thousands of samples, more for fewer (`settled`).
        jacobian: ``λ_J`` on ``∫‖∂f/∂z‖_F²``, likewise.
        total_derivative: Weight of ``∫‖(∂f/∂z) f + ∂f/∂t‖²`` (eq. 7); needs nested differentiation, so it is slow.
        hjb: Weight of ``∫|∂Φ/∂t − ½‖∇Φ‖²|`` of a potential (OT-Flow, eq. 7). Its loss ``α₁L + α₂C + α₃R``, L with a ½,
            is this one times ``α₂ d`` where ``λ_K = α₁/(2α₂)`` and ``hjb = α₃/α₂``.
        convention: ``"paper"``: summed over the blocks, per data dimension, in nats. ``"ffjord-rnode"``: ½ on the
            kinetic term, each block's mean over its own dimensions, added to bits per dimension.
        divergence: ``"hutchinson"`` estimates with probes; ``"exact"`` takes the full Jacobian; ``"auto"`` is exact up
            to `EXACT_TRAINING` dimensions, and where the network has the trace in closed form (a potential).
        noise: Distribution of the probes.
        probes: Number ``k`` of probes per sample and block.
    """

    kinetic: float | Literal["auto"] = 0.01
    jacobian: float | Literal["auto"] = 0.01
    total_derivative: float = 0.0
    hjb: float = 0.0
    convention: Literal["paper", "ffjord-rnode"] = "paper"
    divergence: Literal["auto", "hutchinson", "exact"] = "hutchinson"
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    probes: int = 1

    def settled(self, samples: int, dim: int) -> Self:
        """The same with numbers, for that many training samples of so many dimensions.

        The fewer samples a dimension has, the sooner a flow learns the samples themselves, and what holds it back is
        the penalty: λ = 5 d/n, between 0.01, with which thousands are learned along nearly straight paths, and 1
        (docs/training.md has the measurements).
        """
        weight = min(1.0, max(0.01, 5 * dim / samples))
        auto = {name: weight for name in ("kinetic", "jacobian") if getattr(self, name) == "auto"}
        return self.changed(auto)

    @property
    def weights(self) -> tuple[float, float, float]:
        """``λ_K``, ``λ_J`` and the total derivative's weight.

        Raises:
            ConfigError: One is ``"auto"``, and how many samples there are is not known here.
        """
        for name in ("kinetic", "jacobian"):
            if getattr(self, name) == "auto":
                raise ConfigError(
                    f"{name} = 'auto' depends on the number of samples: give a number, or `settled(n, d)`"
                )
        return float(self.kinetic), float(self.jacobian), self.total_derivative

    def estimator(self, dim: int, *, closed_trace: bool = False) -> Divergence:
        """The divergence of training a flow of that many dimensions, which may have the trace in closed form."""
        exact = self.divergence == "exact" or (self.divergence == "auto" and (closed_trace or dim <= EXACT_TRAINING))
        return Divergence("exact" if exact else "hutchinson", self.probes)

    def _validate(self) -> None:
        at_least(self, 0, "kinetic", "jacobian", "total_derivative", "hjb")
        at_least(self, 1, "probes")


@dataclass(frozen=True)
class Divergence(Section):
    """How the divergence ``tr ∂f/∂z`` is got where a flow is used.

    A bare word where a divergence is expected is its kind.

    Args:
        kind: ``"exact"`` takes the trace itself, ``"hutchinson"`` estimates it with Gaussian probes, ``"auto"`` is
            exact up to `EXACT_LIMIT` dimensions.
        probes: Probes ``k`` per sample and block of an estimate; `None` is 1, or 16 where its error is asked for.
        seed: Seed of the probes, and of the noise that dequantises integers: the same numbers for the same samples.
    """

    kind: Literal["auto", "exact", "hutchinson"] = "auto"
    probes: int | None = None
    seed: int = 0

    _bare_word = "kind"

    def _validate(self) -> None:
        at_least(self, 1, "probes")
        at_least(self, 0, "seed")

    def exact(self, dim: int) -> bool:
        """Whether it is exact for a flow of that many dimensions."""
        return self.kind == "exact" or (self.kind == "auto" and dim <= EXACT_LIMIT)


SolverLike = SolverConfig | Mapping[str, Any] | str | None
"""A solver as its user gives it: whole, by the settings that differ from the usual one's, by its name, or that one."""

DivergenceLike = Divergence | Mapping[str, Any] | str | None
"""A divergence as its user gives it, likewise; a bare word is its kind."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """How a trained flow is used and scored: with an accurate solver, other than the one of training.

    Args:
        solver: The accurate solver.
        divergence: Its divergence.
        draws: Dequantisation draws ``K`` per image.
        chunk: Samples per solve.
        test_limit: Score at most this many test samples; `None` scores all.
        grid: Samples drawn for the report's picture.
    """

    solver: SolverConfig = field(default_factory=lambda: SolverConfig(name="DP5"))
    divergence: Divergence = field(default_factory=Divergence)
    draws: int = 3
    chunk: int = CHUNK
    test_limit: int | None = None
    grid: int = 64

    def _validate(self) -> None:
        at_least(self, 1, "draws", "chunk", "test_limit", "grid")


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """A whole run: the sections, and who computes it.

    Args:
        engine: ``"torch"``, ``"julia"``, or ``"auto"``: Julia where it is installed and ready, else PyTorch.
        device: A torch device, or ``"auto"``: CUDA where there is one.
        dtype: Floating-point type of the state and the parameters.
        seed: Seed of initialisation, data order and noise.
    """

    engine: Engine = "auto"
    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    solver: SolverConfig = field(default_factory=lambda: SolverConfig(name="auto", step_size="auto"))
    penalties: PenaltyConfig = field(default_factory=PenaltyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def _validate(self) -> None:
        at_least(self, 0, "seed")
        if (set_ := self.evaluation.solver.precision) != "ieee":
            raise ConfigError(f"evaluation.solver.precision = {set_!r}: scores are 'ieee'; train in solver.precision")
        if self.solver.numbers != "ieee":
            self._check_coarse()

    def _check_coarse(self) -> None:
        """Raises `ConfigError` where the training solver's precision has no meaning beside the other settings."""
        for named, meant in (
            (self.dtype == "float64", "dtype = 'float64', which has no coarse products; set it to 'float32'"),
            (self.engine == "julia", "engine = 'julia', which computes in IEEE's numbers alone; set it to 'torch'"),
            (self.flow.network.kind == "potential", "network.kind = 'potential'; set it to 'mlp'"),
            (self.penalties.total_derivative > 0, "penalties.total_derivative; set it to 0"),
        ):
            if named:
                raise ConfigError(f"solver.precision = {self.solver.precision!r} beside {meant}, or leave it at 'ieee'")

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Reads a configuration from TOML text; unknown keys and wrong values raise `ConfigError`."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits, and too deep brackets
            raise ConfigError(f"not valid TOML: {error}") from None
        return cls.from_dict(table)

    def to_toml(self) -> str:
        """The configuration as TOML text, every value written out."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def preset(cls, name: str) -> Self:
        """A configuration that ships with pyrnode (see `presets`), or one read from a ``.toml`` file's path."""
        if name.endswith(".toml"):
            path = Path(name)
            if not os.path.isfile(path):
                raise ConfigError(f"preset file {shown(name)} does not exist")
            try:
                return cls.from_toml(path.read_text(encoding="utf-8"))
            except (OSError, ConfigError, UnicodeDecodeError) as error:
                raise ConfigError(f"preset file {name!r}: {error}") from None
        if name not in (table := presets()):
            raise ConfigError(unknown_name("preset", name, table))
        return cls.from_toml((_PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


_PRESETS = resources.files("pyrnode") / "presets"


def presets() -> dict[str, str]:
    """The presets that ship with pyrnode: name → first comment line of its file."""
    table = {}
    for entry in sorted(_PRESETS.iterdir(), key=lambda e: e.name.removesuffix(".toml")):
        if entry.name.endswith(".toml"):
            table[entry.name.removesuffix(".toml")] = entry.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return table


def made_for(state_shape: tuple[int, ...]) -> str:
    """The preset of data that none is named for, by the shape of a flow's states."""
    if len(state_shape) > 1:
        return "images"
    return "table" if state_shape[0] < WIDE else "wide-table"
