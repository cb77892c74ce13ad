# The density that one flow of Julia's has learned after some seconds of training, and the memory that it took: RNODE, a Lux model in RNODE,
# RNODE trained by Lux's own loop, DiffEqFlux.FFJORD and ContinuousNormalizingFlows. One process for each:
#
#     julia peers_density.jl SIDE SECONDS [FILE]
#
# All have the network 64-64-64, batches of 512 of the same 20,000 samples of eight Gaussians, both penalties at 0.01, Adam at 3e-3 and the grid of
# RK4 with step 0.25. The first step, compilation included, is not part of the seconds; where FILE is named, training waits until there is one.
# What is learned is scored by the same means for all: exact trace, Vern7 at 1e-8, on 2,000 held-out samples, less the true log-density. The last line is JSON.
# The peers' densities of themselves are beside it, to show that they are the same thing.

using LinearAlgebra, Random, Statistics
using ComponentArrays: ComponentArray
using DiffEqFlux: DiffEqFlux
using Lux: Lux, Chain, Dense, Optimisers, softplus
using OrdinaryDiffEqLowOrderRK: RK4
using RNODE
using SciMLSensitivity: BacksolveAdjoint, InterpolatingAdjoint, ZygoteVJP
using ADTypes: AutoZygote
using Zygote: Zygote

BLAS.set_num_threads(1)
const RNG, BATCH, GRID = Xoshiro(0), 512, (; adaptive=false, dt=0.25f0)
const SOLVER = Solver("RK4"; step_size=0.25, sensealg="Backprop")

# Eight Gaussians of deviation 0.5 on a circle of radius 4, scaled to deviation 1.
const SCALE = sqrt(16 / 2 + 0.25)
const CENTRES = [4 * f(k * π / 4) for f in (cos, sin), k in 0:7]
draw(rng, n) = Float32.((CENTRES[:, rand(rng, 1:8, n)] .+ 0.5 .* randn(rng, 2, n)) ./ SCALE)
function exact(x)
    y = SCALE .* Float64.(x)
    each = [-sum(abs2, y[:, i] .- CENTRES[:, k]) / 0.5 for k in 1:8, i in axes(y, 2)]
    most = maximum(each; dims=1)
    return vec(most .+ log.(sum(exp, each .- most; dims=1))) .- log(8 * 2π * 0.25) .+ 2log(SCALE)
end
const DATA, HELD = draw(Xoshiro(1), 20_000), draw(Xoshiro(2), 2_000)

network(inputs) = Chain(Dense(inputs => 64, softplus), Dense(64 => 64, softplus), Dense(64 => 64, softplus), Dense(64 => 2))
accurate(dynamics, θ) = RNODE.Distributions.logpdf(
    RNODEDistribution(RNODELayer(dynamics; solver=Solver("Vern7"; rtol=1e-8, atol=1e-8, together=true)), (; θ=Float64.(θ))), Float64.(HELD),
)

# Each side: parameters, the gradient of the loss, the dynamics and the vector of what was learned, and its own log-density.

function rnode()
    dynamics = MLP(2)
    θ = RNODE.LuxCore.initialparameters(RNG, dynamics).θ
    bars = repeat([-1.0f0 0.01f0 0.01f0] ./ BATCH, BATCH)
    function gradient(θ, x)
        solution, back = pullback(dynamics, θ, x, Probes(RNG, x), (0.0, 1.0), SOLVER)
        return back(solution.z ./ BATCH, bars)[2]
    end
    return θ, gradient, θ -> (dynamics, θ), nothing
end

layer_loss(layer, ps, st, x) = (out = first(layer(x, ps, st)); (-sum(out.logp) + 0.01f0 * sum(out.E) + 0.01f0 * sum(out.n)) / BATCH)

function lux_model()
    model = network(3)
    ps, st = Lux.setup(RNG, model)
    dynamics = LuxDynamics(model, ps, st; event=(2,))
    layer, ps = RNODELayer(dynamics; solver=SOLVER), (; θ=collect(ComponentArray(ps)))
    state = (; rng=RNG)
    gradient(θ, x) = only(Zygote.gradient(θ -> layer_loss(layer, (; θ), state, x), θ))
    return ps.θ, gradient, θ -> (dynamics, θ), nothing
end

"RNODE's layer in Lux's own loop, which has its optimiser inside."
function lux_training()
    layer = RNODELayer(MLP(2); solver=SOLVER)
    ps, st = Lux.setup(RNG, layer)
    state = Ref(Lux.Training.TrainState(layer, ps, st, Optimisers.Adam(3.0f-3)))
    loss(layer, ps, st, x) = (layer_loss(layer, ps, st, x), st, (;))
    step(x) = (state[] = last(Lux.Training.single_train_step!(AutoZygote(), loss, x, state[])); nothing)
    return nothing, step, _ -> (layer.model, state[].parameters.θ), nothing
end

function diffeqflux()
    model = network(2)
    flow = DiffEqFlux.FFJORD(model, (0.0f0, 1.0f0), (2,), RK4(); GRID..., sensealg=BacksolveAdjoint(; autojacvec=ZygoteVJP()))
    ps, st = Lux.setup(RNG, flow)
    ps, regular = ComponentArray(ps), (; st..., regularize=true, monte_carlo=true)
    function loss(ps, x)
        (logp, E, n), _ = flow(x, ps, regular)
        return -mean(logp) + 0.01f0 * mean(E) + 0.01f0 * mean(n)
    end
    dynamics = LuxDynamics(model, Lux.setup(RNG, model)...; event=(2,), time=:none)
    own(ps) = first(first(flow(HELD, ps, (; st..., regularize=false, monte_carlo=false))))
    return ps, (ps, x) -> only(Zygote.gradient(ps -> loss(ps, x), ps)), ps -> (dynamics, collect(ps)), own
end

# The interface of version 0.30, as in peers.jl.
function icnf()
    @eval using ContinuousNormalizingFlows
    model = network(3)
    flow = @invokelatest ContinuousNormalizingFlows.ICNF(;
        nn=model, nvars=2, naugmented=0, λ₁=1.0f-2, λ₂=1.0f-2, λ₃=0.0f0, steer_rate=0.0f0, tspan=(0.0f0, 1.0f0),
        compute_mode=(@invokelatest ContinuousNormalizingFlows.LuxVecJacMatrixMode(AutoZygote())),
        sol_kwargs=(; alg=RK4(), sensealg=InterpolatingAdjoint(; autojacvec=ZygoteVJP()), GRID...),
    )
    ps, st = @invokelatest Lux.setup(RNG, flow)
    ps, mode = ComponentArray(ps), @invokelatest ContinuousNormalizingFlows.TrainMode()
    gradient(ps, x) = only(@invokelatest Zygote.gradient(ps -> ContinuousNormalizingFlows.loss(flow, mode, x, ps, st), ps))
    dynamics = LuxDynamics(model, Lux.setup(RNG, model)...; event=(2,))
    own(ps) = first(@invokelatest ContinuousNormalizingFlows.inference(flow, ContinuousNormalizingFlows.TestMode(), HELD, ps, st))
    return ps, gradient, ps -> (dynamics, collect(ps)), own
end

const SIDES = Dict("rnode" => rnode, "lux-model" => lux_model, "lux-training" => lux_training, "diffeqflux" => diffeqflux, "icnf" => icnf)

function main(side, seconds, file="")
    ps, gradient, learned, own = SIDES[side]()
    loaded, batch() = Sys.maxrss(), DATA[:, rand(RNG, axes(DATA, 2), BATCH)]
    optimiser = ps === nothing ? nothing : Optimisers.setup(Optimisers.Adam(3.0f-3), ps)
    function step()
        ps === nothing && return gradient(batch())
        optimiser, ps = Optimisers.update!(optimiser, ps, gradient(ps, batch()))
        return nothing
    end
    first_step = @elapsed step()
    step()
    compiled = Sys.maxrss()
    println("first step: $(round(first_step; digits=1)) s")
    flush(stdout)
    while !isempty(file) && !isfile(file)
        sleep(0.1)
    end
    times, bytes, start = Float64[], 0, time()
    while time() - start < parse(Float64, seconds)
        taken = @timed step()
        push!(times, 1e3 * taken.time)
        bytes = taken.bytes
    end
    trained = Sys.maxrss()
    println("trained: $(length(times)) steps")
    flush(stdout)
    density = accurate(learned(ps)...)
    gap = mean(exact(HELD) .- density)
    theirs = own === nothing ? "null" : mean(abs, own(ps) .- density)
    numbers = [
        "first_step" => first_step, "steps" => length(times), "milliseconds" => median(times), "bytes" => bytes, "gap" => gap,
        "own_density_differs" => theirs, "rss_loaded" => loaded, "rss_compiled" => compiled, "rss_trained" => trained,
    ]
    println("{\"side\": \"$side\", ", join(("\"$k\": $v" for (k, v) in numbers), ", "), "}")
end

main(ARGS...)
