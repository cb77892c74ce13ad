"""Dynamics ``f(z, t; θ)`` with their vector-Jacobian products."""

from pyrnode.dynamics.base import Dynamics, Evaluation, Kernel
from pyrnode.dynamics.layered import MLP, ConvNet
from pyrnode.dynamics.module import ModuleDynamics

__all__ = ["MLP", "ConvNet", "Dynamics", "Evaluation", "Kernel", "ModuleDynamics"]
