# What a Julia user has without Python: a layer trained in Lux, any Lux model as dynamics, and a right-hand side that costs
# little. Prints "<what> <number>"; tests/test_julia_native.py knows what to expect.
push!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using Lux: Lux, Optimisers
using Random: MersenneTwister, randn!
using RNODE
using Zygote: Zygote

relative(a, b) = maximum(abs, a - b) / maximum(abs, b)

"The loss of eq. 17, per dimension."
function loss(layer, ps, st, x)
    out, _ = layer(x, ps, st)
    return (-sum(out.logp) + 0.01 * sum(out.E) + 0.02 * sum(out.n)) / length(x)
end

let rng = MersenneTwister(0)
    layer = RNODELayer(MLP(2, (8, 8); activation="tanh"); solver=Solver("RK4"; step_size=0.25, sensealg="Backprop"), exact=true)
    ps, st = Lux.setup(rng, layer)
    ps = (; θ=0.5 .* randn(rng, length(ps.θ)))
    x = randn(rng, 2, 32) .+ [2.0, -1.0]

    # The layer is `integrate` with the base density, and its gradient is that of central differences.
    solution = integrate(layer.model, ps.θ, x, exact_probes(), (0.0, 1.0), layer.solver)
    expected = vec(-sum(abs2, solution.z; dims=1) ./ 2) .- log(2π) .+ solution.l
    println("layer ", relative(first(layer(x, ps, st)).logp, expected))
    gradient = only(Zygote.gradient(p -> loss(layer, p, st, x), ps)).θ
    direction = randn(rng, length(ps.θ))
    shifted(s) = loss(layer, (; θ=ps.θ .+ s .* direction), st, x)
    println("gradient ", abs(sum(gradient .* direction) / ((shifted(1e-5) - shifted(-1e-5)) / 2e-5) - 1))

    before, optimiser = loss(layer, ps, st, x), Optimisers.setup(Optimisers.Adam(0.02), ps)
    for _ in 1:30
        optimiser, ps = Optimisers.update(optimiser, ps, only(Zygote.gradient(p -> loss(layer, p, st, x), ps)))
    end
    println("trained ", loss(layer, ps, st, x) - before)
    back = RNODE.generate(layer, ps, integrate(layer.model, ps.θ, x, nothing, (0.0, 1.0), layer.solver).z)
    println("generated ", maximum(abs, back - x))
end

# A Lux model against the explicit product with the same weights: torch's weight (out, in) is ours transposed, and time is
# the last input of each layer.
let rng = MersenneTwister(1)
    explicit = MLP(3, (5,); activation="tanh", time=:none)
    chain = Lux.Chain(Lux.Dense(3 => 5, tanh), Lux.Dense(5 => 3))
    ps, st = Lux.setup(rng, chain)
    ps = Lux.fmap(x -> 0.5 .* randn(rng, size(x)...), ps)
    flat(ps) = reduce(vcat, [[vec(permutedims(l.weight)); l.bias] for l in ps])
    θ, θ_lux = flat(ps), reduce(vcat, [[vec(l.weight); l.bias] for l in ps])
    unflat(v) = (i = Ref(0); take(n) = (v[(i[] + 1):(i[] += n)]);
        reduce(vcat, [(w = take(o * n); b = take(o); [vec(permutedims(reshape(w, o, n))); b]) for (n, o) in ((3, 5), (5, 3))]))
    dynamics = LuxDynamics(chain, ps, st; event=(3,), time=:none)
    z, ε, z_bar, q_bar = randn(rng, 3, 4), randn(rng, 3, 4, 2), randn(rng, 3, 4), randn(rng, 4, 3)
    for sensealg in ("Backprop", "InterpolatingAdjoint")
        solver = Solver("RK4"; sensealg)
        (a, back_a), (b, back_b) = (pullback(d, p, z, Probes(ε, 0.5), (0.0, 1.0), solver) for (d, p) in ((dynamics, θ_lux), (explicit, θ)))
        println("lux-$sensealg ", maximum(relative(getproperty(a, n), getproperty(b, n)) for n in (:z, :l, :E, :n)))
        (za, θa), (zb, θb) = back_a(z_bar, q_bar), back_b(z_bar, q_bar)
        println("lux-gradient-$sensealg ", max(relative(za, zb), relative(unflat(θa), θb)))
    end
end

"The largest error of a dense layer's three products, relative to the largest number in each."
function products(::Type{T}) where {T}
    worst = 0.0
    for (inputs, outputs) in ((64, 64), (2, 64), (64, 2), (50, 37), (3, 33), (17, 100)), batch in (1, 5, 6, 13)
        rng = MersenneTwister(batch)
        weight, h, g, start = randn(rng, T, inputs, outputs), randn(rng, T, inputs, batch), randn(rng, T, outputs, batch), randn(rng, T, inputs, outputs)
        layer = RNODE.dense(weight, copy(start))
        layer isa RNODE.SmallDense || error("the layer has BLAS's products")
        exact(x) = Float64.(x)
        y = RNODE.apply!(fill(T(NaN), outputs, batch), layer, h)
        x = RNODE.transpose!(fill(T(NaN), inputs, batch), layer, g)
        RNODE.accumulate!(layer, h, g, 0.5)
        expected = (exact(weight)' * exact(h), exact(weight) * exact(g), exact(start) + 0.5 .* exact(h) * exact(g)')
        worst = max(worst, maximum(relative.((y, x, layer.gradient), expected)) / eps(T))
    end
    return worst
end

println("products ", max(products(Float32), products(Float64)))

"The same of a convolution's, beside NNlib's."
function convolutions(::Type{T}) where {T}
    worst = 0.0
    for (inputs, outputs) in ((16, 16), (1, 3), (7, 6)), side in (1, 3, 5, 7), size in ((28, 28), (5, 3), (1, 1), (14, 9))
        rng = MersenneTwister(side)
        weight, start = randn(rng, T, side, side, inputs, outputs), randn(rng, T, side, side, inputs, outputs)
        h, g = randn(rng, T, size..., inputs, 2), randn(rng, T, size..., outputs, 2)
        ours, theirs = RNODE.convolution(weight, copy(start), size), RNODE.Conv(weight, copy(start), RNODE.turn(weight))
        ours isa RNODE.DirectConv || error("the layer has NNlib's convolutions")
        found, expected = map((ours, theirs)) do layer
            y = RNODE.apply!(fill(T(NaN), Base.size(g)), layer, h)
            x = RNODE.transpose!(fill(T(NaN), Base.size(h)), layer, g)
            RNODE.accumulate!(layer, h, g, 0.5)
            return (y, x, layer.gradient)
        end
        worst = max(worst, maximum(relative.(found, expected)) / eps(T))
    end
    return worst
end

println("convolutions ", max(convolutions(Float32), convolutions(Float64)))

"A batch in many pieces against the same in one and many: the largest difference of solves and of gradients."
function pieces(sensealg, batch)
    rng = MersenneTwister(7)
    dynamics, solver = MLP(2, (64, 64, 64)), Solver("RK4"; sensealg)
    θ = 0.2 .* randn(rng, sum(length, dynamics.specs))
    x, ε, z_bar, q_bar = randn(rng, 2, batch), randn(rng, 2, batch, 1), randn(rng, 2, batch), randn(rng, batch, 3)
    solve(columns) = pullback(dynamics, θ, x[:, columns], Probes(ε[:, columns, :], 1.0), (0.0, 1.0), solver)
    whole, back = solve(1:batch)
    x_bar, θ_bar = back(z_bar, q_bar)
    parts = [1:30, 31:batch]
    found = map(parts) do columns
        part, back = solve(columns)
        return (part, back(z_bar[:, columns], q_bar[columns, :]))
    end
    return maximum((
        relative(reduce(hcat, part.z for (part, _) in found), whole.z), relative(reduce(vcat, part.l for (part, _) in found), whole.l),
        relative(reduce(hcat, bars[1] for (_, bars) in found), x_bar), relative(sum(bars[2] for (_, bars) in found), θ_bar),
    ))
end

# 36 samples make a piece; of 6,500 the stages are not all kept.
for sensealg in ("Backprop", "InterpolatingAdjoint"), batch in (97, 6_500)
    println("pieces-$sensealg-$batch ", pieces(sensealg, batch))
end

"""
The memory of kept evaluations: a pullback gives it back and the next solve has the same again. Neither a pullback that comes after
other solves nor a second one, when others have had the memory, gives anything else than the first.
"""
function kept_memory()
    dynamics, solver, rng = MLP(2, (64, 64, 64)), Solver("RK4"; sensealg="Backprop"), MersenneTwister(3)
    θ, x = 0.2 .* randn(rng, sum(length, dynamics.specs)), randn(rng, 2, 200)
    probes, bars = Probes(rng, x), (randn(rng, 2, 200), randn(rng, 200, 3))
    held() = (bytes = sum(length, RNODE.FREE; init=0); bytes == RNODE.FREE_BYTES[] ? bytes : error("not counted"))
    start() = last(pullback(dynamics, θ, x, probes, (0.0, 1.0), solver))
    RNODE.forget_memory!()
    first_back = start()
    taken, expected = held(), start()(bars...)
    after_one = held()
    foreach(_ -> start()(bars...), 1:3)
    again, after_both = first_back(bars...), held()
    last(pullback(dynamics, θ, 2x, probes, (0.0, 1.0), solver))
    second = first_back(bars...)
    foreach(_ -> RNODE.give_back!(zeros(UInt8, 2^20)), 1:300)
    bounded = held() == RNODE.FREE_LIMIT
    return taken == 0 && after_one > 0, after_both == 2after_one, bounded, max(maximum(relative.(again, expected)), maximum(relative.(second, expected)))
end

let (given_back, used_again, bounded, error) = kept_memory()
    println("memory ", Int(given_back && used_again && bounded))
    println("memory-error ", error)
end

"Bytes of one right-hand side, compiled, and whether its types are known."
function cost(::Type{T}) where {T}
    dynamics = MLP(2, (64, 64, 64))
    θ = fill(T(0.1), sum(length, dynamics.specs))
    z = ones(T, 2, 512)
    asked = RNODE.Asked(1, false, false)
    system = RNODE.Augmented(RNODE.workers(dynamics, θ, z, size(z, 2), asked, 1), nothing, ones(T, 2, 512, 1), 1.0, size(z), 3)
    u = RNODE.initial_state(system, z)
    du = similar(u)
    RNODE.rate!(du, system, u, 0.5)
    bytes = @allocated RNODE.rate!(du, system, u, 0.5)
    bound = first(values(system.workers[1].bindings))
    returned = only(Base.return_types(RNODE.rate!, typeof.((du, system, u, 0.5))))
    columns = first(system.workers[1].pieces)
    product = only(Base.return_types(RNODE.evaluate!, typeof.((bound, 0.5, view(z, :, columns), nothing, view(system.probes, :, columns, :), false))))
    return bytes, isconcretetype(returned), isconcretetype(product)
end

let (bytes, returned, product) = cost(Float32)
    println("threads ", Threads.nthreads())
    println("bytes ", bytes)
    println("stable ", Int(returned && product))
end
