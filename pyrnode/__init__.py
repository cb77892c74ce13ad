"""pyrnode: regularised neural ODEs that give back densities (Finlay et al. 2020, *How to train your neural ODE*).

The whole public interface is here. Importing it starts nothing and costs what importing torch costs::

    import pyrnode

    result = pyrnode.train("digits", out="runs/digits")
    print(result.report)
    images = result.flow.sample(16)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyrnode import bounded, data, distribution, export, sbi, transforms
from pyrnode.anomalies import Calibration, calibrate, score_file
from pyrnode.architecture import FlowConfig, NetworkConfig
from pyrnode.columns import ColumnsConfig
from pyrnode.config import (
    Config,
    DataConfig,
    Divergence,
    EvaluationConfig,
    PenaltyConfig,
    SolverConfig,
    presets,
)
from pyrnode.distribution import FlowDistribution, FlowTransform
from pyrnode.dynamics import MLP, ConvNet, Dynamics, ModuleDynamics, Potential, PotentialDynamics
from pyrnode.engines import Engine, Probes, Solution
from pyrnode.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    EngineUnavailableError,
    ProcessError,
    PyrnodeError,
    SolverError,
    TrainingDivergedError,
)
from pyrnode.evaluation import Report, evaluate
from pyrnode.export import TorchFlow
from pyrnode.flow import Flow, load
from pyrnode.optimisation import TrainingConfig
from pyrnode.pages import report
from pyrnode.shards import merge_shards, score_shard
from pyrnode.training import TrainingResult, train
from pyrnode.training.callbacks import Callback, TensorBoard, TrainingRun
from pyrnode.version import VERSION

if TYPE_CHECKING:
    from pyrnode.estimator import RNODEDensity
    from pyrnode.paper import reproduce

__version__ = VERSION

__all__ = [
    "MLP",
    "Calibration",
    "Callback",
    "CheckpointError",
    "ColumnsConfig",
    "Config",
    "ConfigError",
    "ConvNet",
    "DataConfig",
    "DataError",
    "Divergence",
    "Dynamics",
    "Engine",
    "EngineError",
    "EngineUnavailableError",
    "EvaluationConfig",
    "Flow",
    "FlowConfig",
    "FlowDistribution",
    "FlowTransform",
    "ModuleDynamics",
    "NetworkConfig",
    "PenaltyConfig",
    "Potential",
    "PotentialDynamics",
    "Probes",
    "ProcessError",
    "PyrnodeError",
    "RNODEDensity",
    "Report",
    "Solution",
    "SolverConfig",
    "SolverError",
    "TensorBoard",
    "TorchFlow",
    "TrainingConfig",
    "TrainingDivergedError",
    "TrainingResult",
    "TrainingRun",
    "bounded",
    "calibrate",
    "data",
    "distribution",
    "evaluate",
    "export",
    "load",
    "merge_shards",
    "presets",
    "report",
    "reproduce",
    "sbi",
    "score_file",
    "score_shard",
    "train",
    "transforms",
]


_LATE = {"RNODEDensity": "pyrnode.estimator", "reproduce": "pyrnode.paper"}
"""What needs scikit-learn or SciPy, and is imported on first use."""


def __getattr__(name: str) -> Any:
    """What is imported on first use."""
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module 'pyrnode' has no attribute {name!r}")
