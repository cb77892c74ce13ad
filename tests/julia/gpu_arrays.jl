# The code that would run on a GPU, on arrays that forbid what a GPU cannot do: one number at a time. JLArrays' kernels are
# GPUArrays' own, run on the CPU. Only what CUDA's libraries do, convolutions and products of many matrices, is stood in for.
# Prints "<case> <largest relative error>".
push!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using JLArrays: JLArray, JLArrays
using LuxCore: LuxCore
using NNlib: NNlib, DenseConvDims
using Random: MersenneTwister
using RNODE

JLArrays.allowscalar(false)

const Four = JLArray{T,4} where {T<:AbstractFloat}
NNlib.conv!(y::Four, x::Four, w::Four, dims::DenseConvDims; kwargs...) =
    copyto!(y, NNlib.conv!(Array(y), Array(x), Array(w), dims; kwargs...))
NNlib.∇conv_filter!(w̄::Four, x::Four, ȳ::Four, dims::DenseConvDims; kwargs...) =
    copyto!(w̄, NNlib.∇conv_filter!(Array(w̄), Array(x), Array(ȳ), dims; kwargs...))

function NNlib._batched_gemm!(::Type{<:JLArray}, tA::Char, tB::Char, α, A, B, β, C)
    out = Array(C)
    NNlib._batched_gemm!(typeof(out), tA, tB, α, Array(A), Array(B), β, out)
    return copyto!(C, out)
end

"State, integrals and gradients, all as plain arrays."
function numbers(array, dynamics, θ, z, ε, z_bar, q_bar, solver; hjb=false)
    probes = ε === nothing ? exact_probes() : Probes(array(ε), 0.5)
    solution, back = pullback(dynamics, array(θ), array(z), probes, (0.0, 1.0), solver; hjb)
    z0_bar, θ̄ = back(array(z_bar), array(q_bar))
    array === Array || foreach(x -> x isa JLArray || error("a result is a $(typeof(x))"), (solution.z, solution.l, z0_bar, θ̄))
    return map(Array, (solution.z, solution.l, solution.E, solution.n, (hjb ? (solution.H,) : ())..., z0_bar, θ̄))
end

relative(found, expected) = maximum(maximum(abs, a - b) / maximum(abs, b) for (a, b) in zip(found, expected))

let rng = MersenneTwister(0)
    try
        JLArray([1.0, 2.0])[1]
        error("scalar indexing is allowed")
    catch exception
        occursin("Scalar indexing", sprint(showerror, exception)) || rethrow()
    end
    for time in (:concat, :concatsquash, :none), (kind, event) in (("mlp", (3,)), ("conv", (5, 4, 2)))
        activation = time === :none ? "gelu" : "softplus"
        dynamics = kind == "mlp" ? MLP(3, (4, 5); time, activation) : ConvNet(event, (3, 4); time, activation)
        θ = 0.3 .* randn(rng, LuxCore.parameterlength(dynamics))
        z, z_bar = randn(rng, event..., 4), randn(rng, event..., 4)
        ε, q_bar = randn(rng, event..., 4, 2), randn(rng, 4, 3)
        methods = [("RK4", "Backprop"), ("RK4", "InterpolatingAdjoint")]
        time === :concat && append!(methods, [("Tsit5", "Backprop"), ("Tsit5", "InterpolatingAdjoint")])
        for (name, sensealg) in methods
            solver = Solver(name; sensealg, rtol=1e-8, atol=1e-8, together=true)
            args = (dynamics, θ, z, ε, z_bar, q_bar, solver)
            println("$kind-$time-$name-$sensealg ", relative(numbers(JLArray, args...), numbers(Array, args...)))
        end
    end
    for (name, ε) in (("drawn", randn(rng, 3, 4, 2)), ("exact", nothing))
        dynamics = PotentialNetwork(3, (5, 5, 5))
        θ, z, z_bar = 0.5 .* randn(rng, LuxCore.parameterlength(dynamics)), randn(rng, 3, 4), randn(rng, 3, 4)
        args = (dynamics, θ, z, ε, z_bar, randn(rng, 4, 5), Solver("RK4"; sensealg="Backprop"))
        println("potential-$name ", relative(numbers(JLArray, args...; hjb=true), numbers(Array, args...; hjb=true)))
    end
end
