# A density trained in Julia alone, from a layer of Lux to a file: no Python (docs/julia_package.md).
#
#     julia --project=PROJECT --threads=2 examples/native.jl [--quick]
#
# PROJECT is a Julia project with the package RNODE (`pkg> dev julia`, in a checkout), or with what it needs: `pyrnode doctor` names
# the one that pyrnode uses.
#
# Learns a ring of eight Gaussians, whose density is known: with the training written out, in Lux's way, and with `fit` in one call.
# Prints the loss of the paper before and after, the gaps to the truth, and that the layer, `integrate`, the distribution, its file and
# a quadrature over the plane agree.

push!(LOAD_PATH, joinpath(@__DIR__, "..", "julia"))  # the package RNODE, for a project that has only what it needs

using Lux, Random, RNODE, Zygote
using LinearAlgebra: BLAS
using Lux: Optimisers
using Printf: @printf
using RNODE.Distributions: fit, logpdf  # in a project of your own that has it: using Distributions

BLAS.set_num_threads(1)  # RNODE splits a batch over Julia's threads; BLAS's own would get in their way

# --- the data: (2, n), one column a sample, and their true log-density in nats ---

const MEANS = Float32[f(2π * i / 8) * 1.4 for f in (cos, sin), i in 0:7]
const SPREAD = 0.2f0

draw(rng, n) = MEANS[:, rand(rng, 1:8, n)] .+ SPREAD .* randn(rng, Float32, 2, n)

function true_logpdf(x)
    squares = [sum(abs2, x[:, j] - MEANS[:, i]) for i in 1:8, j in axes(x, 2)]
    return vec(log.(sum(exp.(squares ./ (-2SPREAD^2)); dims=1) ./ (8 * 2π * SPREAD^2)))
end

# --- the flow and its loss (eq. 17), in nats per dimension ---

const DYNAMICS = MLP(2, (64, 64, 64); activation="tanh")
const LAYER = RNODELayer(DYNAMICS; solver=Solver("RK4"; step_size=0.25, sensealg="Backprop"), exact=true)
const λ_K, λ_J = 0.001f0, 0.001f0

function loss(layer, ps, st, x)
    out, st = layer(x, ps, st)
    return (-sum(out.logp) + λ_K * sum(out.E) + λ_J * sum(out.n)) / length(x), st, (;)
end

function train(rng, ps, st, steps)
    state = Training.TrainState(LAYER, deepcopy(ps), st, Optimisers.Adam(3.0f-3))
    for step in 1:steps
        Optimisers.adjust!(state.optimizer_state, 1.5f-3 * (1 + cospi(Float32(step - 1) / steps)))
        _, _, _, state = Training.single_train_step!(AutoZygote(), loss, draw(rng, 512), state)
    end
    return state.parameters
end

# --- what it is worth ---

function main(steps)
    rng = Xoshiro(0)
    test = draw(rng, 2000)
    start, st = Lux.setup(rng, LAYER)
    seconds = @elapsed ps = train(rng, start, st, steps)
    before, after = first(loss(LAYER, start, st, test)), first(loss(LAYER, ps, st, test))
    @printf("loss before %.4f, after %d steps %.4f nats per dimension (%.1f s with compilation)\n",
        before, steps, after, seconds)

    # A distribution of Distributions.jl, which scores with another, accurate solver than that of training.
    accurate = Solver("DP5"; rtol=1e-6, atol=1e-6, together=true)
    d = RNODEDistribution(RNODELayer(DYNAMICS; solver=accurate), ps)
    gap(d) = sum(true_logpdf(test) - logpdf(d, test)) / size(test, 2)
    @printf("gap to the true density %.4f nats per sample\n", gap(d))

    # The layer is `integrate` with the probes of its own generator.
    noisy = RNODELayer(DYNAMICS; solver=LAYER.solver)
    out, _ = noisy(test, ps, st)
    probes = Probes(Lux.replicate(st.rng), test)
    solution = integrate(DYNAMICS, ps.θ, test, probes, (0.0, 1.0), LAYER.solver)
    logp = solution.l .- vec(sum(abs2, solution.z; dims=1)) ./ 2 .- log(2.0f0π)
    difference = maximum(maximum(abs.(a - b)) for (a, b) in ((out.logp, logp), (out.E, solution.E), (out.n, solution.n)))
    @printf("layer and integrate differ by at most %.1e; %d evaluations of f a sample\n", difference, solution.stats.nfe)

    # A density integrates to one; samples are base points carried back, and lead to them again.
    axis = range(-4.0f0, 4.0f0; length=121)
    grid = Float32[(x, y)[i] for i in 1:2, (x, y) in vec(collect(Iterators.product(axis, axis)))]
    @printf("integral over the plane %.5f\n", sum(exp, logpdf(d, grid)) * step(axis)^2)
    x = rand(rng, d, 1000)
    z = integrate(DYNAMICS, ps.θ, x, nothing, (0.0, 1.0), accurate).z
    again = integrate(DYNAMICS, ps.θ, z, nothing, (1.0, 0.0), accurate).z
    @printf("1000 samples to the base and back: at most %.1e from where they came\n", maximum(abs, again - x))

    # A file, which Python reads too: pyrnode.load("ring.safetensors").
    loaded = load_flow(save_flow(joinpath(mktempdir(), "ring.safetensors"), d); solver=accurate)
    @printf("read from its file, its log-densities differ by at most %.1e\n", maximum(abs, logpdf(loaded, test) - logpdf(d, test)))

    # All of the training in one call, on 5,000 samples instead of new ones in every step.
    fitted = fit(RNODELayer, draw(rng, 5000); dynamics=DYNAMICS, steps, solver=LAYER.solver, kinetic=λ_K, jacobian=λ_J, rng)
    @printf("gap of fit(RNODELayer, X) %.4f nats per sample\n", gap(fitted))
    return nothing
end

main("--quick" in ARGS ? 60 : 800)
