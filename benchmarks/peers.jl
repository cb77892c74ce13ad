# Times a training step (loss and gradient of every parameter) of RNODE beside the continuous normalizing flows of Julia, on
# the 2-D MLP 64-64-64 with a batch of 512: RK4 with step 0.25, one probe, both penalties, InterpolatingAdjoint with
# ZygoteVJP for all. Steps alternate in one process. benchmarks/julia_speed.py runs it; its last line is JSON.
#
# The peers' probes change at every evaluation (DiffEqFlux) or once a solve (ContinuousNormalizingFlows), their penalties are
# norms rather than squares, and DiffEqFlux's network has no time. This makes their work no greater than ours.

using LinearAlgebra, Random, Statistics
using ComponentArrays: ComponentArray
using DiffEqFlux: DiffEqFlux
using Lux: Lux, Chain, Dense, softplus
using OrdinaryDiffEqLowOrderRK: RK4
using RNODE
using SciMLSensitivity: InterpolatingAdjoint, ZygoteVJP
using Zygote: Zygote

const PAIRS, BATCH = parse(Int, ARGS[1]), 512
Threads.nthreads() > 1 && BLAS.set_num_threads(1)  # ours splits the batch over threads; set back for the peers
const RNG = Xoshiro(0)
const X = randn(RNG, Float32, 2, BATCH)

function rnode_step(sensealg)
    dynamics, solver = MLP(2), Solver("RK4"; step_size=0.25, sensealg)
    θ = 0.1f0 .* randn(RNG, Float32, RNODE.LuxCore.parameterlength(dynamics))
    bars = repeat([-1.0f0 0.01f0 0.01f0 0.0f0], BATCH)
    return function ()
        BLAS.set_num_threads(Threads.nthreads() > 1 ? 1 : 2)
        solution, back = pullback(dynamics, θ, X, Probes(RNG, X), (0.0, 1.0), solver)
        return back(solution.z, bars)
    end
end

network(inputs) = Chain(Dense(inputs => 64, softplus), Dense(64 => 64, softplus), Dense(64 => 64, softplus), Dense(64 => 2))
const FIXED = (; adaptive=false, dt=0.25f0)

function diffeqflux_step()
    flow = DiffEqFlux.FFJORD(network(2), (0.0f0, 1.0f0), (2,), RK4(); FIXED...)
    ps, st = Lux.setup(RNG, flow)
    ps, st = ComponentArray(ps), (; st..., regularize=true, monte_carlo=true)
    function loss(ps)
        (logp, E, n), _ = flow(X, ps, st)
        return -mean(logp) + 0.01f0 * mean(E) + 0.01f0 * mean(n)
    end
    return function ()
        BLAS.set_num_threads(2)
        return Zygote.gradient(loss, ps)
    end
end

function icnf_step()
    @eval using ContinuousNormalizingFlows, ADTypes
    sensealg = InterpolatingAdjoint(; autojacvec=ZygoteVJP())
    flow = @invokelatest ContinuousNormalizingFlows.ICNF(;
        nn=network(3), nvars=2, naugmented=0, λ₁=1.0f-2, λ₂=1.0f-2, λ₃=0.0f0, steer_rate=0.0f0, tspan=(0.0f0, 1.0f0),
        sol_kwargs=(; save_everystep=false, alg=RK4(), sensealg, FIXED...),
    )
    ps, st = @invokelatest Lux.setup(RNG, flow)
    ps = ComponentArray(ps)
    mode = @invokelatest ContinuousNormalizingFlows.TrainMode()
    return function ()
        BLAS.set_num_threads(2)
        return @invokelatest Zygote.gradient(p -> ContinuousNormalizingFlows.loss(flow, mode, X, p, st), ps)
    end
end

steps = Pair{String,Any}["RNODE" => rnode_step("InterpolatingAdjoint"), "RNODE, Backprop" => rnode_step("Backprop")]
push!(steps, "DiffEqFlux.FFJORD" => diffeqflux_step())
if Base.find_package("ContinuousNormalizingFlows") !== nothing
    push!(steps, "ContinuousNormalizingFlows" => icnf_step())
end
times = Dict(name => Float64[] for (name, _) in steps)
for (name, step) in steps
    try
        step()
    catch exception
        println("$name does not run: ", first(sprint(showerror, exception), 300))
        delete!(times, name)
    end
end
filter!(pair -> haskey(times, first(pair)), steps)
for _ in 1:PAIRS, (name, step) in steps
    push!(times[name], 1e3 * @elapsed step())
end
allocated = @allocated last(first(steps))()

function bytes_per_evaluation()
    dynamics, z = MLP(2), X
    θ = zeros(Float32, RNODE.LuxCore.parameterlength(dynamics))
    ε = reshape(randn(RNG, Float32, 2, BATCH), 2, BATCH, 1)
    system = RNODE.Augmented(RNODE.workers(dynamics, θ, z, 1), nothing, ε, 1.0, size(z), 3)
    u = RNODE.initial_state(system, z)
    du = similar(u)
    RNODE.rate!(du, system, u, 0.5f0)
    return @allocated RNODE.rate!(du, system, u, 0.5f0)
end

bytes_per_evaluation()
rows = join(("\"$name\": $(median(values))" for (name, values) in times), ", ")
println("{\"milliseconds\": {$rows}, \"allocated_per_step\": $allocated, \"allocated_per_evaluation\": $(bytes_per_evaluation())}")
