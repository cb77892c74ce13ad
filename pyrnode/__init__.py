"""pyrnode: regularised neural ODEs that give back densities (Finlay et al. 2020, *How to train your neural ODE*).

The whole public interface is here. Importing it starts nothing and costs what importing torch costs::

    import pyrnode

    result = pyrnode.train("digits", out="runs/digits")
    print(result.report)
    images = result.flow.sample(16)
"""

from pyrnode import data, transforms
from pyrnode.checkpoint import load_flow as load
from pyrnode.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FlowConfig,
    NetworkConfig,
    PenaltyConfig,
    SolverConfig,
    TrainingConfig,
    presets,
)
from pyrnode.dynamics import MLP, ConvNet, Dynamics, ModuleDynamics
from pyrnode.engines import Engine, Probes, Solution
from pyrnode.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineUnavailableError,
    PyrnodeError,
    SolverError,
    TrainingDivergedError,
)
from pyrnode.evaluation import Report, evaluate
from pyrnode.flow import Flow
from pyrnode.training import TrainingResult, train

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ConvNet",
    "DataConfig",
    "DataError",
    "Dynamics",
    "Engine",
    "EngineUnavailableError",
    "EvaluationConfig",
    "Flow",
    "FlowConfig",
    "ModuleDynamics",
    "NetworkConfig",
    "PenaltyConfig",
    "Probes",
    "PyrnodeError",
    "Report",
    "Solution",
    "SolverConfig",
    "SolverError",
    "TrainingConfig",
    "TrainingDivergedError",
    "TrainingResult",
    "data",
    "evaluate",
    "load",
    "presets",
    "train",
    "transforms",
]
