"""
    RNODE

Regularised neural ODEs (Finlay et al. 2020): the augmented system of one block, solved by any algorithm of OrdinaryDiffEq
and differentiated by the adjoints of SciMLSensitivity or through the discrete steps. With probes `ε` held fixed,

    z' = f(z, t; θ)      l' = εᵀ(∂f/∂z)ε      E' = ‖f‖²      n' = ‖εᵀ∂f/∂z‖²      H' = |∂Φ/∂t − ½‖∇Φ‖²| where f = −∇Φ

[`RNODELayer`](@ref) is one as a layer of Lux, [`RNODEDistribution`](@ref) a trained one as a distribution. The same names, symbols and memory as
the Python package pyrnode has (which comes in through `RNODEBridge`): a C-order torch array
`(B, C, H, W)` is `(W, H, C, B)` here.
"""
module RNODE

using ADTypes: AutoFiniteDiff, AutoZygote
using ChainRulesCore: ChainRulesCore, NoTangent, unthunk
using ComponentArrays: ComponentArray, ComponentArrays, getaxes, getdata
using DiffEqFlux: DiffEqFlux
using Distributions: Distributions, ContinuousMultivariateDistribution
using JSON: JSON
using LinearAlgebra: BLAS, BlasReal, mul!
using Lux: Lux, Optimisers, StatefulLuxLayer
using LuxCore: LuxCore, AbstractLuxLayer, AbstractLuxWrapperLayer
using MLDataDevices: MLDataDevices
using NNlib: NNlib, DenseConvDims
using OrdinaryDiffEqAdamsBashforthMoulton: OrdinaryDiffEqAdamsBashforthMoulton
using OrdinaryDiffEqBDF: OrdinaryDiffEqBDF
using OrdinaryDiffEqFeagin: OrdinaryDiffEqFeagin
using OrdinaryDiffEqFIRK: OrdinaryDiffEqFIRK
using OrdinaryDiffEqHighOrderRK: OrdinaryDiffEqHighOrderRK
using OrdinaryDiffEqLowOrderRK: OrdinaryDiffEqLowOrderRK
using OrdinaryDiffEqLowStorageRK: OrdinaryDiffEqLowStorageRK
using OrdinaryDiffEqRosenbrock: OrdinaryDiffEqRosenbrock
using OrdinaryDiffEqSDIRK: OrdinaryDiffEqSDIRK
using OrdinaryDiffEqSSPRK: OrdinaryDiffEqSSPRK
using OrdinaryDiffEqStabilizedRK: OrdinaryDiffEqStabilizedRK
using OrdinaryDiffEqTsit5: OrdinaryDiffEqTsit5
using OrdinaryDiffEqVerner: OrdinaryDiffEqVerner
using PrecompileTools: @compile_workload
using Random: Random, AbstractRNG
using SHA: SHA
using SciMLBase: SciMLBase, ODEFunction, ODEProblem
using SciMLSensitivity: SciMLSensitivity, BacksolveAdjoint, GaussAdjoint, InterpolatingAdjoint, QuadratureAdjoint, ZygoteVJP
using SpecialFunctions: erfc
using Zygote: Zygote

export MLP, ConvNet, PotentialNetwork, LuxDynamics, Probes, Solver, Solution, SolveError, RNODELayer
export RNODEDistribution, algorithms, algorithm, exact_probes, integrate, load_flow, potential, pullback, save_flow

include("activations.jl")  # φ, φ', φ''
include("products.jl")     # c = a b for small matrices
include("convolutions.jl") # the same for a CPU's images
include("layers.jl")       # a = s(t) ⊙ (W h) + β(t), and its transpose
include("dynamics.jl")     # what dynamics are to the engine
include("memory.jl")       # what evaluations keep for their pullbacks
include("layered.jl")      # MLP and ConvNet with an explicit εᵀ∂f/∂z
include("potential.jl")    # f = −∇Φ: the network of Φ, and its gradient
include("bound_potential.jl") # its curvature in explicit products, and the pullback of all
include("module.jl")       # any Lux model, through nested differentiation
include("augmented.jl")    # the right-hand side, its pullback, and the norm of its error
include("failures.jl")   # solves that fail or are interrupted
include("options.jl")    # what a solver's options are
include("solvers.jl")      # algorithms by name, and their tableaus
include("engine.jl")       # one solve, and its pullback by every sensitivity algorithm
include("backprop.jl")     # the pullback through the solve's own steps
include("flux.jl")         # the layer for Julia users: RNODELayer <: DiffEqFlux.CNFLayer
include("transforms.jl")   # what data go through before the blocks
include("distribution.jl") # a trained flow for Distributions.jl, and its training in one call
include("json.jl")       # what files say of themselves
include("files.jl")      # flows as files that Python reads and writes too
include("precompile.jl")

end
