# A potential's network as a Julia user has it. Prints "<what> <number>"; tests/test_julia_native.py knows what to expect.
push!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using Lux: Lux, Optimisers
using LuxCore: LuxCore
using Random: MersenneTwister
using RNODE
using Zygote: Zygote

relative(a, b) = maximum(abs, a .- b) / max(1, maximum(abs, b))

const CASES = [
    ("logcosh", (5,), :concat, false), ("logcosh", (20, 20, 20), :concat, true), ("softplus", (4, 4), :none, true), ("tanh", (4, 4), :concat, false),
]

"One step of Euler's of length one from t: z + f, and the integrands."
step(network, θ, t, z, probes, context; hjb=true) =
    pullback(network, θ, z, probes, (t, t + 1), Solver("Euler"; step_size=1.0, sensealg="Backprop"); context, hjb)

"The kernel against Zygote's gradient of Φ, and that against central differences."
function kernel(activation, hidden, time, conditional)
    rng = MersenneTwister(1)
    network = PotentialNetwork(3, hidden; activation, time, rank=2, context=conditional)
    θ, z, t = 0.6 .* randn(rng, LuxCore.parameterlength(network)), randn(rng, 3, 4), 0.3
    context = conditional ? randn(rng, RNODE.context_length(network), 4) : nothing
    phi(t, z) = potential(network, θ, t, z; context)
    slope(z) = only(Zygote.gradient(z -> sum(phi(t, z)), z))
    central(f, h) = (f(h) .- f(-h)) ./ 2h
    ε = randn(rng, 3, 4, 2)
    drawn, closed, unit = (
        first(step(network, θ, t, z, probes, context)) for
        probes in (Probes(ε, 0.5), exact_probes(), Probes(RNODE.unit_vectors(z), 1.0))
    )
    f, rise = -slope(z), central(h -> phi(t + h, z), 1e-5)
    w = [central(h -> -slope(z .+ h .* ε[:, :, k]), 1e-4) for k in 1:2]  # the Jacobian is symmetric
    l, n = (sum(vec(sum(op(w[k], ε[:, :, k]); dims=1)) for k in 1:2) ./ 2 for op in ((w, e) -> w .* e, (w, e) -> w .* w))
    return Dict(
        "f" => relative(drawn.z .- z, f),
        "residual" => relative(drawn.H, abs.(rise .- vec(sum(abs2, f; dims=1)) ./ 2)),
        "products" => max(relative(drawn.l, l), relative(drawn.n, n)),
        "exact" => maximum(relative(getproperty(closed, name), getproperty(unit, name)) for name in (:z, :l, :E, :n, :H)),
    )
end

let found = [kernel(case...) for case in CASES]
    foreach(name -> println(name, " ", maximum(case[name] for case in found)), ("f", "residual", "products", "exact"))
end

"OT-Flow's loss, per dimension."
function loss(layer, ps, st, x)
    out, _ = layer(x, ps, st)
    return (-sum(out.logp) + 0.05 * sum(out.E) + 0.02 * sum(out.n) + 0.1 * sum(out.H)) / length(x)
end

let rng = MersenneTwister(0)
    solver = Solver("RK4"; step_size=0.25, sensealg="Backprop")
    layer = RNODELayer(PotentialNetwork(2, (8, 8)); solver, hjb=true)
    println("default ", Int(layer.exact))
    ps, st = Lux.setup(rng, layer)
    println("start ", maximum(abs, integrate(layer.model, ps.θ, ones(Float32, 2, 3), nothing, (0.0, 1.0), solver).z .- 1))
    ps = (; θ=Float64.(ps.θ) .+ 0.3 .* randn(rng, length(ps.θ)))
    x = randn(rng, 2, 32) .+ [2.0, -1.0]

    solution = integrate(layer.model, ps.θ, x, exact_probes(), (0.0, 1.0), solver; hjb=true)
    println("layer ", relative(first(layer(x, ps, st)).H, solution.H))
    gradient, direction = only(Zygote.gradient(p -> loss(layer, p, st, x), ps)).θ, randn(rng, length(ps.θ))
    shifted(s) = loss(layer, (; θ=ps.θ .+ s .* direction), st, x)
    println("gradient ", abs(sum(gradient .* direction) / ((shifted(1e-5) - shifted(-1e-5)) / 2e-5) - 1))

    before, optimiser = loss(layer, ps, st, x), Optimisers.setup(Optimisers.Adam(0.02), ps)
    for _ in 1:30
        optimiser, ps = Optimisers.update(optimiser, ps, only(Zygote.gradient(p -> loss(layer, p, st, x), ps)))
    end
    println("trained ", loss(layer, ps, st, x) - before)
end

"Whether what `make` does is an `ArgumentError` that says `words`."
refused(make, words) =
    try
        make()
        false
    catch exception
        exception isa ArgumentError && occursin(words, exception.msg)
    end

println("refused ", Int(all((
    refused(() -> PotentialNetwork(2, (4, 5)), "one positive width for all"),
    refused(() -> PotentialNetwork(2, ()), "one positive width for all"),
    refused(() -> PotentialNetwork(0), "dim = 0"),
    refused(() -> PotentialNetwork(2; activation="elu"), "known: logcosh, softplus, tanh"),
    refused(() -> PotentialNetwork(2; time=:concatsquash), ":concat, :none"),
    refused(() -> PotentialNetwork(2; rank=0), "rank = 0"),
    refused(() -> PotentialNetwork(2; initial=:zero), ":identity or :ot_flow"),
    refused(() -> MLP(2; activation="logcosh"), "unknown activation"),
    refused(() -> RNODELayer(MLP(2); hjb=true), "gradient of a potential"),
    refused(() -> integrate(PotentialNetwork(2), zeros(3), ones(2, 3), nothing, (0.0, 1.0), Solver(); total_derivative=true), "has none"),
))))
