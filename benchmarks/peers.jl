# Times a training step (loss and gradient of every parameter) of one continuous normalizing flow of Julia's beside RNODE's, on
# the 2-D MLP 64-64-64 with a batch of 512, one probe and both penalties. Steps alternate in one process.
# benchmarks/julia_speed.py runs it once for each peer; lines say what is done, such as each side's first step; the last is JSON.
#
#     julia peers.jl PEER PAIRS
#
# The peers' probes change at every evaluation (DiffEqFlux) or once a solve (ContinuousNormalizingFlows), their penalties are
# norms rather than squares, and DiffEqFlux's network has no time. This makes the work of an evaluation no greater than ours.
#
# Where steps are chosen by an estimate of their error, DiffEqFlux's new noise is taken for error, and steps are as short as the
# tolerance is small: with SciML's own tolerances ("tsit5") a gradient takes many minutes, so there is a loose one too. On a fixed
# grid ("rk4") its InterpolatingAdjoint goes through the solve again in the backward pass (a solve that keeps only its end
# counts as checkpointed), with the tolerances but without `adaptive=false` and `dt`, and the same happens.
# BacksolveAdjoint, which the layer's keywords can name, keeps to the grid.

using LinearAlgebra, Random, Statistics
using ComponentArrays: ComponentArray
using DiffEqFlux: DiffEqFlux
using Lux: Lux, Chain, Dense, softplus
using OrdinaryDiffEqLowOrderRK: RK4
using OrdinaryDiffEqTsit5: Tsit5
using RNODE
using SciMLSensitivity: BacksolveAdjoint, InterpolatingAdjoint, ZygoteVJP
using Zygote: Zygote

const PEER, PAIRS, BATCH = ARGS[1], parse(Int, ARGS[2]), 512
const RNG = Xoshiro(0)
const X = randn(RNG, Float32, 2, BATCH)
const FIXED = (; adaptive=false, dt=0.25f0)

function rnode_step(name, sensealg; options...)
    dynamics, solver = MLP(2), Solver(name; sensealg, options...)
    θ = 0.1f0 .* randn(RNG, Float32, RNODE.LuxCore.parameterlength(dynamics))
    bars = repeat([-1.0f0 0.01f0 0.01f0 0.0f0], BATCH)
    return function ()
        BLAS.set_num_threads(1)  # its threads split the batch
        solution, back = pullback(dynamics, θ, X, Probes(RNG, X), (0.0, 1.0), solver)
        return back(solution.z, bars)
    end
end

network(inputs) = Chain(Dense(inputs => 64, softplus), Dense(64 => 64, softplus), Dense(64 => 64, softplus), Dense(64 => 2))

function diffeqflux_step(alg; options...)
    flow = DiffEqFlux.FFJORD(network(2), (0.0f0, 1.0f0), (2,), alg; options...)
    ps, st = Lux.setup(RNG, flow)
    ps, st = ComponentArray(ps), (; st..., regularize=true, monte_carlo=true)
    function loss(ps)
        (logp, E, n), _ = flow(X, ps, st)
        return -mean(logp) + 0.01f0 * mean(E) + 0.01f0 * mean(n)
    end
    return function ()
        BLAS.set_num_threads(Threads.nthreads())
        return Zygote.gradient(loss, ps)
    end
end

# The interface of version 0.30. The mode is its default and the fastest of those tried; it takes the batch as one matrix.
# All steps are saved (a solve that keeps only its end counts as checkpointed), so its backward pass keeps to the grid.
function icnf_step()
    @eval using ContinuousNormalizingFlows, ADTypes
    sensealg = InterpolatingAdjoint(; autojacvec=ZygoteVJP())
    flow = @invokelatest ContinuousNormalizingFlows.ICNF(;
        nn=network(3), nvars=2, naugmented=0, λ₁=1.0f-2, λ₂=1.0f-2, λ₃=0.0f0, steer_rate=0.0f0, tspan=(0.0f0, 1.0f0),
        compute_mode=(@invokelatest ContinuousNormalizingFlows.LuxVecJacMatrixMode(ADTypes.AutoZygote())),
        sol_kwargs=(; alg=RK4(), sensealg, FIXED...),
    )
    ps, st = @invokelatest Lux.setup(RNG, flow)
    ps = ComponentArray(ps)
    mode = @invokelatest ContinuousNormalizingFlows.TrainMode()
    loss(ps) = ContinuousNormalizingFlows.loss(flow, mode, X, ps, st)
    return function ()
        BLAS.set_num_threads(Threads.nthreads())
        return @invokelatest Zygote.gradient(loss, ps)
    end
end

const GRID = "RNODE, RK4, InterpolatingAdjoint" => () -> rnode_step("RK4", "InterpolatingAdjoint"; step_size=0.25)

"Each peer after the steps of ours that it is to be seen beside."
const SIDES = Dict(
    "tsit5-loose" => [
        GRID,
        "RNODE, Tsit5 1e-2" => () -> rnode_step("Tsit5", "InterpolatingAdjoint"; rtol=1e-2, atol=1e-2, together=true),
        "DiffEqFlux.FFJORD, Tsit5 1e-2" => () -> diffeqflux_step(Tsit5(); reltol=1.0f-2, abstol=1.0f-2),
    ],
    "rk4-backsolve" => [
        GRID,
        "RNODE, RK4, Backprop" => () -> rnode_step("RK4", "Backprop"; step_size=0.25),
        "RNODE, RK4, BacksolveAdjoint" => () -> rnode_step("RK4", "BacksolveAdjoint"; step_size=0.25),
        "DiffEqFlux.FFJORD, RK4, BacksolveAdjoint" =>
            () -> diffeqflux_step(RK4(); FIXED..., sensealg=BacksolveAdjoint(; autojacvec=ZygoteVJP())),
    ],
    "tsit5" => ["DiffEqFlux.FFJORD, Tsit5" => () -> diffeqflux_step(Tsit5())],
    "rk4" => ["DiffEqFlux.FFJORD, RK4" => () -> diffeqflux_step(RK4(); FIXED...)],
    "icnf" => [GRID, "ContinuousNormalizingFlows" => icnf_step],
)

function bytes_per_evaluation()
    dynamics, z = MLP(2), X
    θ = zeros(Float32, RNODE.LuxCore.parameterlength(dynamics))
    ε = reshape(randn(RNG, Float32, 2, BATCH), 2, BATCH, 1)
    system = RNODE.Augmented(RNODE.workers(dynamics, θ, z, size(z, 2), 1, 1), nothing, ε, 1.0, size(z), 3)
    u = RNODE.initial_state(system, z)
    du = similar(u)
    RNODE.rate!(du, system, u, 0.5f0)
    return @allocated RNODE.rate!(du, system, u, 0.5f0)
end

if PEER == "icnf" && Base.find_package("ContinuousNormalizingFlows") === nothing
    println("ContinuousNormalizingFlows is not in the Julia environment")
    exit(1)
end
println("the packages are loaded")
flush(stdout)
steps = [name => make() for (name, make) in SIDES[PEER]]
for (name, step) in steps
    println("first step of $name: $(round(@elapsed(step()); digits=1)) s, compilation included")
    flush(stdout)
end
times, allocated = Dict(name => Float64[] for (name, _) in steps), Dict{String,Int}()
for round in 1:PAIRS
    for (name, step) in steps
        taken = @timed step()
        push!(times[name], 1e3 * taken.time)
        allocated[name] = taken.bytes
    end
    println("step $round of $PAIRS of each side is done")
    flush(stdout)
end
bytes_per_evaluation()
object(pairs) = "{" * join(("\"$name\": $value" for (name, value) in pairs), ", ") * "}"
milliseconds = object(name => median(values) for (name, values) in times)
println("{\"milliseconds\": $milliseconds, \"bytes\": $(object(allocated)), \"bytes per evaluation\": $(bytes_per_evaluation())}")
