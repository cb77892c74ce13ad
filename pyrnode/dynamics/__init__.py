"""Dynamics ``f(z, t; θ)`` with their vector-Jacobian products."""

from pyrnode.dynamics.base import BoundDynamics, Cotangents, Dynamics, GradientDynamics, Linearization
from pyrnode.dynamics.layered import MLP, ConvNet
from pyrnode.dynamics.nested import ModuleDynamics
from pyrnode.dynamics.potential import Potential, PotentialDynamics

__all__ = [
    "MLP",
    "BoundDynamics",
    "ConvNet",
    "Cotangents",
    "Dynamics",
    "GradientDynamics",
    "Linearization",
    "ModuleDynamics",
    "Potential",
    "PotentialDynamics",
]
