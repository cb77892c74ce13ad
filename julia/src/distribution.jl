# A trained flow as a distribution of Distributions.jl, and its training in one call (pyrnode/flow.py, pyrnode/estimator.py).

"""
    RNODEDistribution(layer::RNODELayer, ps)

A flow with its parameters as a `Distributions.ContinuousMultivariateDistribution`: `logpdf` (nats) of a vector or of a matrix, one
column a sample, `rand`, `loglikelihood`, and whatever Distributions.jl has of them. The trace is exact, so that the density is no estimate;
the layer's solver computes it. [`Distributions.fit`](@ref) and [`load_flow`](@ref) give one too. Of vectors alone, without a context: else `ArgumentError`.

# Example
A layer whose parameters are zero leaves data where they are, so that its density is the base's.

```jldoctest
julia> using Distributions, RNODE

julia> layer = RNODELayer(MLP(2, (4,)));

julia> d = RNODEDistribution(layer, (; θ=zeros(28)))
RNODEDistribution of 2 dimensions: 1 block of Layered, 28 parameters in Float64

julia> round.(logpdf(d, [0.0 1.0; 0.0 1.0]); digits=6)
2-element Vector{Float64}:
 -1.837877
 -2.837877

julia> size(rand(d, 1000))
(2, 1000)
```
"""
struct RNODEDistribution{V<:AbstractVector} <: ContinuousMultivariateDistribution
    layers::Vector{RNODELayer}  # the blocks in the order in which they carry data to the base
    θ::Vector{V}                # the parameters of each
    transforms::Vector{Transform}  # what data go through before

    function RNODEDistribution(layers::Vector{<:RNODELayer}, θ::Vector{V}, transforms::AbstractVector{<:Transform}) where {V<:AbstractVector}
        for (layer, parameters) in zip(layers, θ)
            given = event_size(layer.model)
            length(given) == 1 && context_length(layer.model) == 0 || throw(ArgumentError(
                "dynamics of states of size $given and context length $(context_length(layer.model)): a distribution is of vectors, " *
                "without a context",
            ))
            for part in transforms
                dim = dimensions(part)
                dim in (only(given), nothing) || throw(DimensionMismatch("a block of $(only(given)) dimensions: expected $dim"))
            end
            expected = LuxCore.parameterlength(layer.model)
            length(parameters) == expected ||
                throw(DimensionMismatch("$(length(parameters)) parameters: expected $expected, as the dynamics have them"))
        end
        return new{V}(layers, θ, transforms)
    end
end

event_size(d::Union{Layered,LuxDynamics}) = d.event
event_size(d::PotentialNetwork) = (d.dim,)

RNODEDistribution(layer::RNODELayer, ps) = RNODEDistribution([layer], [ps.θ], Transform[])

Base.length(d::RNODEDistribution) = first(event_size(first(d.layers).model))
Base.eltype(::Type{RNODEDistribution{V}}) where {V} = eltype(V)
Base.show(io::IO, d::RNODEDistribution) = print(
    io, "RNODEDistribution of ", length(d), " dimensions: ", length(d.layers), " block", length(d.layers) == 1 ? "" : "s", " of ",
    nameof(typeof(first(d.layers).model)), ", ", sum(length, d.θ), " parameters in ", eltype(d),
)

check_length(d, x) =
    size(x, 1) == length(d) || throw(DimensionMismatch("samples of $(size(x, 1)) numbers: expected $(length(d))"))

function Distributions.logpdf(d::RNODEDistribution, x::AbstractMatrix{<:Real})
    check_length(d, x)
    y, log_determinants = Float64.(x), zeros(size(x, 2))
    for transform in d.transforms
        y, each = transform(y)
        log_determinants += each
    end
    z = convert(Matrix{eltype(d)}, y)
    l = zeros(eltype(d), size(x, 2))
    for (layer, θ) in zip(d.layers, d.θ)
        solution = integrate(layer.model, θ, z, exact_probes(), layer.tspan, layer.solver)
        z, l = solution.z, l + solution.l
    end
    return base_logpdf(z) .+ l .+ log_determinants
end

Distributions._logpdf(d::RNODEDistribution, x::AbstractVector{<:Real}) = only(Distributions.logpdf(d, reshape(x, :, 1)))
Distributions._logpdf!(r::AbstractArray{<:Real}, d::RNODEDistribution, x::AbstractMatrix{<:Real}) =
    copyto!(r, Distributions.logpdf(d, x))
Distributions.loglikelihood(d::RNODEDistribution, x::AbstractMatrix{<:Real}) = sum(Distributions.logpdf(d, x))

"Samples (d, batch) of base points `z`: the blocks run from the end time to the start, the last one first."
function generate(d::RNODEDistribution, z::AbstractMatrix)
    check_length(d, z)
    for (layer, θ) in Iterators.reverse(zip(d.layers, d.θ))
        z = generate(layer, (; θ), z)
    end
    return foldr(invert, d.transforms; init=Float64.(z))
end

Distributions._rand!(rng::AbstractRNG, d::RNODEDistribution, x::AbstractMatrix{<:Real}) =
    copyto!(x, generate(d, randn(rng, eltype(d), size(x)...)))
Distributions._rand!(rng::AbstractRNG, d::RNODEDistribution, x::AbstractVector{<:Real}) =
    copyto!(x, generate(d, randn(rng, eltype(d), length(x), 1)))

# --- training ---

"""
    fit(RNODELayer, X; dynamics=MLP(d, (64, 64, 64); activation="tanh"), steps=1000, batch=512, rate=3e-3, kinetic=0.01, jacobian=0.01,
        solver=Solver("RK4"; step_size=0.25, sensealg="Backprop"), accurate=Solver("DP5"), probes=1, validation=0.1, rng)

Learns the density of the columns of `X` (d, n): an [`RNODEDistribution`](@ref), which computes with the solver `accurate`. The data are brought to
mean 0 and standard deviation 1; each of `steps` steps of Adam, whose rate falls from `rate` to 0 by a cosine, takes `batch` samples and the
paper's loss (eq. 17) with `kinetic` λ_K and `jacobian` λ_J and so many `probes`. The share `validation` of the samples is held out, scored
twenty times on the way, and the parameters that were best on it are those of the result. The element type of `X` is that of the
computation.

Throws `ArgumentError` for data that are not finite or have a constant row, and for numbers out of range.
"""
function Distributions.fit(
    ::Type{<:RNODELayer}, X::AbstractMatrix{T};
    dynamics::Dynamics=MLP(size(X, 1), (64, 64, 64); activation="tanh"), steps::Integer=1000, batch::Integer=512, rate::Real=3e-3,
    kinetic::Real=0.01, jacobian::Real=0.01, solver::Solver=Solver("RK4"; step_size=0.25, sensealg="Backprop"),
    accurate::Solver=Solver("DP5"), probes::Integer=1, validation::Real=0.1, rng::AbstractRNG=Random.default_rng(),
) where {T<:AbstractFloat}
    affine = standardizing(X)
    0 < validation < 0.9 || throw(ArgumentError("validation = $validation: expected a share between 0 and 0.9"))
    min(steps, batch, probes) ≥ 1 && rate > 0 || throw(ArgumentError(
        "steps = $steps, batch = $batch, probes = $probes, rate = $rate: expected positive numbers",
    ))
    order = Random.randperm(rng, size(X, 2))
    held = clamp(round(Int, validation * size(X, 2)), 1, size(X, 2) - 1)
    own = convert(Matrix{T}, first(affine(view(X, :, order[(held + 1):end]))))
    judge(θ) = sum(Distributions.logpdf(RNODEDistribution([RNODELayer(dynamics; solver=accurate)], [θ], [affine]), X[:, order[1:held]]))
    θ = convert(Vector{T}, LuxCore.initialparameters(rng, dynamics).θ)
    state, best, found = Optimisers.setup(Optimisers.Adam(T(rate)), θ), copy(θ), judge(θ)
    for step in 1:steps
        Optimisers.adjust!(state, T(rate * (1 + cospi((step - 1) / steps)) / 2))
        x = own[:, rand(rng, 1:size(own, 2), min(batch, size(own, 2)))]
        state, θ = Optimisers.update!(state, θ, loss_gradient(dynamics, θ, x, Probes(rng, x, probes), solver, kinetic, jacobian))
        (step == steps || step % cld(steps, 20) == 0) || continue
        score = judge(θ)
        if score > found
            best, found = copy(θ), score
        end
    end
    return RNODEDistribution([RNODELayer(dynamics; solver=accurate)], [best], [affine])
end

"The gradient of eq. 17, per dimension."
function loss_gradient(dynamics, θ, x::AbstractMatrix{T}, probes, solver, kinetic, jacobian) where {T}
    solution, back = pullback(dynamics, θ, x, probes, (0.0, 1.0), solver)
    q_bar = repeat(T[-1 kinetic jacobian], size(x, 2)) ./ T(length(x))
    return back(solution.z ./ T(length(x)), q_bar)[2]
end

"The transform that brings the rows of `X` to mean 0 and standard deviation 1."
function standardizing(X)
    size(X, 2) ≥ 10 || throw(ArgumentError("$(size(X, 2)) samples: expected 10 or more, one column each"))
    all(isfinite, X) || throw(ArgumentError("data with $(count(!isfinite, X)) values that are not finite"))
    mean = vec(sum(Float64, X; dims=2)) ./ size(X, 2)
    std = sqrt.(vec(sum(abs2, X .- mean; dims=2)) ./ size(X, 2))
    constant = findfirst(iszero, std)
    constant === nothing || throw(ArgumentError("row $constant of the data is constant: drop it"))
    return Affine(mean, std)
end
