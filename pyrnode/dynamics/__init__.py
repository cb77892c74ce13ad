"""Dynamics ``f(z, t; θ)`` with their vector-Jacobian products."""

from pyrnode.dynamics.base import BoundDynamics, Dynamics, Linearization
from pyrnode.dynamics.layered import MLP, ConvNet
from pyrnode.dynamics.nested import ModuleDynamics

__all__ = ["MLP", "BoundDynamics", "ConvNet", "Dynamics", "Linearization", "ModuleDynamics"]
