# What dynamics are to the engine: bound to parameters and to one solve, they evaluate f with εᵀ∂f/∂z and pull
# cotangents back (pyrnode/dynamics/base.py). All arrays that cross this interface are matrices (event, batch), probes'
# (event, batch, k); those that bound dynamics give belong to them, and hold until their next evaluation.

"""
Dynamics `f(z, t; θ)` of one block, or conditional ones `f(z, t, c; θ)`. A subtype has

    bind(dynamics, θ, z0, asked)             bound dynamics for states like `z0` (event..., batch); what is `asked` of them: [`Asked`](@ref)
    evaluate!(bound, t, z, c, ε, tape)       an [`Evaluation`](@ref), of f alone where ε is `nothing`; without `tape` no pullback
                                             will follow
    pullback!(bound, z̄, c̄, bars, α)          writes the cotangent of z at the last evaluation, adds α times that of c to c̄,
                                             and gathers α times that of θ, given the [`Cotangents`](@ref)
    gradient!(θ̄, bound)                      adds the gathered gradient to θ̄, and forgets it

The context `c` (s, batch) is what the network has made of it once and for all (`embed` in Python), and is the same along a solve;
`nothing` for dynamics without one.
"""
abstract type Dynamics <: AbstractLuxLayer end

"""
What is asked of an evaluation with probes beside f: the products with so many `probes`, or, where these are the unit vectors and the dynamics have
a `closed_trace`, trace and norm in place of the products (`closed`); and the residual of the Hamilton-Jacobi equation (`hjb`).
"""
struct Asked
    probes::Int
    closed::Bool
    hjb::Bool
end

"""
The dynamics at a point: `f` (event, batch), the products `w` = εᵀ∂f/∂z (event, batch, k), the total derivative `r` = (∂f/∂z) f + ∂f/∂t
(event, batch); `trace` and squared `norm` of ∂f/∂z in place of the products, and the residual `hjb` = ∂Φ/∂t − ½‖∇Φ‖² of a potential, each (1, batch).
What was not asked for is `nothing`.
"""
struct Evaluation{F,W,R,N,H}
    f::F
    w::W
    r::R
    trace::N
    norm::N
    hjb::H
end

Evaluation(f; w=nothing, r=nothing, trace=nothing, norm=nothing, hjb=nothing) = Evaluation(f, w, r, trace, norm, hjb)

"The cotangents of what an [`Evaluation`](@ref) has, of the same shapes; `nothing` is zero."
struct Cotangents{F,W,R,T,N,H}
    f::F
    w::W
    r::R
    trace::T
    norm::N
    hjb::H
end

Cotangents(f; w=nothing, r=nothing, trace=nothing, norm=nothing, hjb=nothing) = Cotangents(f, w, r, trace, norm, hjb)

"Length s of the embedded context that the dynamics take; 0 for none."
context_length(::Dynamics) = 0

"Whether they have trace and norm of their Jacobian in closed form."
closed_trace(::Dynamics) = false

"Whether they are the gradient of a potential, `f = −∇Φ`, and have the residual of its Hamilton-Jacobi equation."
has_potential(::Dynamics) = false

"Whether they have the total derivative."
has_total_derivative(::Dynamics) = false

"Whether the same dynamics, bound several times, can work in several threads at once."
threaded(::Dynamics) = true

"Bytes that bound dynamics hold for each sample; 0 where that is not known."
sample_bytes(::Dynamics, z0, asked::Asked) = 0

"""
    another(bound, z0)

Bound dynamics for states like `z0` in the same thread: they share the parameters of `bound`, and the memory in which their gradient gathers.
Only asked for where `sample_bytes` is known.
"""
function another end

"""
    keeping(bound, memory)

Bound dynamics for the same states, whose next evaluation stays as it is in arrays from `memory` (see [`take!`](@ref)), so that its pullback
can be asked for at any time, with what [`evaluated!`](@ref) gives. All else they share with `bound`. Only asked for where
`kept_bytes` is not 0.
"""
function keeping end

"Bytes of memory that `keeping` takes; 0 for dynamics that do not have it."
kept_bytes(bound) = 0

"`evaluated!(bound, c)`: what the last evaluation of `keeping`'s gave, and the bound dynamics ready for the pullback."
function evaluated! end

"Columns of the batch as matrices: (event..., batch) to (event, batch)."
matrix(x) = reshape(x, :, size(x, ndims(x)))

"""
Calls `f`, found when the program runs. Where an argument's type is not known, this keeps inference from looking into every
type that there may be, and from there, through numbers of unknown type, into the methods of ReverseDiff, whose types crash a
package image when it is loaded (JuliaLang/julia#62047).
"""
dynamic(f, args...) = Base.inferencebarrier(f)(args...)

"""
Directions in which the Jacobian is probed: `ε` (event..., batch, k), each weighted by 1/k, or by 1 for the unit vectors, which are
[`UnitVectors`](@ref) until something asks for their numbers.
"""
struct Probes{A}
    ε::A
    weight::Float64
end

"Random probes for states like `z`: `:gaussian` or `:rademacher`."
function Probes(rng::AbstractRNG, z, k::Integer=1; noise::Symbol=:gaussian)
    noise in (:gaussian, :rademacher) || throw(ArgumentError("noise = $(repr(noise)): expected :gaussian or :rademacher"))
    ε = Random.randn!(rng, similar(z, size(z)..., k))
    noise === :rademacher && (ε .= ifelse.(ε .< 0, -one(eltype(ε)), one(eltype(ε))))
    return Probes(ε, 1 / k)
end

"The unit vectors of every sample's state, in their order."
struct UnitVectors end

"The unit vectors as probes: sums over them are the trace and the squared Frobenius norm themselves."
exact_probes() = Probes(UnitVectors(), 1.0)

"The unit vectors for states like `z`, as numbers: (event..., batch, d)."
function unit_vectors(z)
    d, batch = size(matrix(z))
    ε = fill!(similar(z, d, batch, d), false)
    foreach(i -> fill!(view(ε, i, :, i), true), 1:d)
    return reshape(ε, size(z)..., d)
end
