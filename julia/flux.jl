# The layer for Julia users: train natively in Lux, without Python.

"""
    RNODELayer(dynamics, tspan=(0.0f0, 1.0f0); solver=Solver("Tsit5"), probes=1, noise=:gaussian, exact=false)

A continuous normalizing flow of one block as a Lux layer, beside DiffEqFlux's `FFJORD`. Called with data `x` (event..., batch)
and the parameters and states of `Lux.setup`, it gives `((; logp, E, n), st)`, each (batch): the log-density, the kinetic energy
and the squared Frobenius norm of the Jacobian, integrated. The regularised loss of the paper (eq. 17) is

    -sum(logp) + λ_K * sum(E) + λ_J * sum(n), divided by length(x)

New probes are drawn for each call from the generator in `st`, and held for the whole solve; `exact` takes the unit vectors.
"""
struct RNODELayer{M<:Dynamics} <: DiffEqFlux.CNFLayer
    model::M
    tspan::Tuple{Float64,Float64}
    solver::Solver
    probes::Int
    noise::Symbol
    exact::Bool
end

RNODELayer(
    dynamics::Dynamics, tspan=(0.0, 1.0); solver=Solver("Tsit5"), probes::Integer=1, noise::Symbol=:gaussian, exact::Bool=false,
) = RNODELayer(dynamics, Float64.(Tuple(tspan)), solver, Int(probes), noise, exact)

LuxCore.initialstates(rng::AbstractRNG, ::RNODELayer) = (; rng=LuxCore.replicate(rng))

function (layer::RNODELayer)(x, ps, st)
    rng = LuxCore.replicate(st.rng)
    probes = ChainRulesCore.@ignore_derivatives layer.exact ? exact_probes(x) : Probes(rng, x, layer.probes; layer.noise)
    solution = integrate(layer.model, ps.θ, x, probes, layer.tspan, layer.solver)
    return (; logp=base_logpdf(solution.z) .+ solution.l, solution.E, solution.n), (; rng)
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
