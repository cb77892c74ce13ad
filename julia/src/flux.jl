# The layer for Julia users: train natively in Lux, without Python.

"""
    RNODELayer(dynamics, tspan=(0.0f0, 1.0f0); solver=Solver("Tsit5"), probes=1, noise=:gaussian, exact, hjb=false)

A continuous normalizing flow of one block as a Lux layer, beside DiffEqFlux's `FFJORD`. Called with data `x` (event..., batch)
and the parameters and states of `Lux.setup`, it gives `((; logp, E, n, H), st)`, each (batch): the log-density, the kinetic energy
and the squared Frobenius norm of the Jacobian, integrated, and `H` = ∫|∂Φ/∂t − ½‖∇Φ‖²| of a potential, where `hjb` asks for it
(else zero). The regularised loss of the paper (eq. 17), with OT-Flow's penalty, is

    -sum(logp) + λ_K * sum(E) + λ_J * sum(n) + hjb * sum(H), divided by length(x)

New probes are drawn for each call from the generator in `st`, and held for the whole solve; `exact` takes the unit vectors, by default
where the dynamics have the trace in closed form ([`PotentialNetwork`](@ref)). Throws `ArgumentError` where `hjb` is asked of other dynamics.
"""
struct RNODELayer{M<:Dynamics} <: DiffEqFlux.CNFLayer
    model::M
    tspan::Tuple{Float64,Float64}
    solver::Solver
    probes::Int
    noise::Symbol
    exact::Bool
    hjb::Bool
end

function RNODELayer(
    dynamics::Dynamics, tspan=(0.0, 1.0); solver=Solver("Tsit5"), probes::Integer=1, noise::Symbol=:gaussian,
    exact::Bool=closed_trace(dynamics), hjb::Bool=false,
)
    check_integrals(dynamics, false, hjb)
    return RNODELayer(dynamics, Float64.(Tuple(tspan)), solver, Int(probes), noise, exact, hjb)
end

LuxCore.initialstates(rng::AbstractRNG, ::RNODELayer) = (; rng=LuxCore.replicate(rng))

function (layer::RNODELayer)(x, ps, st)
    rng = LuxCore.replicate(st.rng)
    probes = ChainRulesCore.@ignore_derivatives layer.exact ? exact_probes() : Probes(rng, x, layer.probes; layer.noise)
    solution = integrate(layer.model, ps.θ, x, probes, layer.tspan, layer.solver; layer.hjb)
    return (; logp=base_logpdf(solution.z) .+ solution.l, solution.E, solution.n, solution.H), (; rng)
end

"log N(z; 0, I) in nats, (batch)."
function base_logpdf(z)
    m = matrix(z)
    return vec(sum(abs2, m; dims=1)) .* (-one(eltype(m)) / 2) .- eltype(m)(size(m, 1) * log(2π) / 2)
end

"""
    generate(layer, ps, z)

Samples (event..., batch) of base points `z`: the flow run from the end time to the start.
"""
generate(layer::RNODELayer, ps, z) = integrate(layer.model, ps.θ, z, nothing, reverse(layer.tspan), layer.solver).z
