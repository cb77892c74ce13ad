# What dynamics are to the engine: bound to parameters and to one solve, they evaluate f with εᵀ∂f/∂z and pull
# cotangents back (pyrnode/dynamics/base.py). All arrays that cross this interface are matrices (event, batch), probes'
# (event, batch, k); those that bound dynamics give belong to them, and hold until their next evaluation.

"""
Dynamics `f(z, t; θ)` of one block, or conditional ones `f(z, t, c; θ)`. A subtype has

    bind(dynamics, θ, z0, k)                 bound dynamics for states like `z0` (event..., batch) and `k` probes
    evaluate!(bound, t, z, c, ε, tape)       (f, w, r): w = εᵀ∂f/∂z, or `nothing` where ε is; r the total derivative
                                             (∂f/∂z) f + ∂f/∂t where they have it, else `nothing`; without `tape`
                                             no pullback will follow
    pullback!(bound, z̄, c̄, f̄, w̄, r̄, α)      writes the cotangent of z at the last evaluation, adds α times that of c to c̄,
                                             and gathers α times that of θ; w̄ and r̄ may be `nothing`
    gradient!(θ̄, bound)                      adds the gathered gradient to θ̄, and forgets it

The context `c` (s, batch) is what the network has made of it once and for all (`embed` in Python), and is the same along a solve;
`nothing` for dynamics without one.
"""
abstract type Dynamics <: AbstractLuxLayer end

"Length s of the embedded context that the dynamics take; 0 for none."
context_length(::Dynamics) = 0

"Whether the same dynamics, bound several times, can work in several threads at once."
threaded(::Dynamics) = true

"Bytes that bound dynamics hold for each sample; 0 where that is not known."
sample_bytes(::Dynamics, z0, k) = 0

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

"Directions in which the Jacobian is probed: `ε` (event..., batch, k), each weighted by 1/k, or by 1 for the unit vectors."
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

"The unit vectors: sums over them are the trace and the squared Frobenius norm themselves."
function exact_probes(z)
    d, batch = size(matrix(z))
    unit = [eltype(z)(i == j) for i in 1:d, _ in 1:batch, j in 1:d]
    return Probes(copyto!(similar(z, size(z)..., d), reshape(unit, size(z)..., d)), 1.0)
end
