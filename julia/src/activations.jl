# Activations φ with the two derivatives that an explicit vector-Jacobian product needs (pyrnode/dynamics/activations.py), and
# the three of a potential (pyrnode/dynamics/scalar.py).
#
# `forward(φ, a)` gives (h, s) = (φ(a), φ'(a)), `bend(φ, a, h, s, g, r)` gives φ''(a) r where g = φ'(a) r. They are plain
# functions of numbers without branches, so that a loop over them becomes vector instructions, and a broadcast a GPU kernel.

abstract type Activation end

"Whether `bend` reads `a` and `r`; where φ''/φ' is a bounded function of h or φ', g does instead, and they are not kept."
keeps(::Activation) = false

struct Softplus <: Activation end
struct Tanh <: Activation end
struct SiLU <: Activation end
struct GELU <: Activation end
struct ELU <: Activation end

keeps(::Union{SiLU,GELU}) = true

"`evalpoly` by pairs of terms: a shorter chain than Horner's."
@inline by_pairs(x, c::NTuple{N}) where {N} =
    evalpoly(x * x, ntuple(i -> 2i ≤ N ? muladd(c[2i], x, c[2i - 1]) : c[2i - 1], Val(cld(N, 2))))

"e^{-x} for x ≥ 0."
@inline decay(x::T) where {T} = exp(-x)
@inline function decay(x::Float32)
    x = ifelse(x > 87.0f0, 87.0f0, x)
    shifted = muladd(x, -1.442695f0, 1.2582912f7)  # the sum's last bits are the nearest integer n to −x / log 2
    n = shifted - 1.2582912f7
    r = muladd(n, -1.42860677f-6, muladd(n, -0.693145751953125f0, -x))
    p = by_pairs(r, (1.0f0, 1.0f0, 0.49999994f0, 0.16666655f0, 0.041668236f0, 0.0083363085f0, 0.0013731f0))
    return p * reinterpret(Float32, (reinterpret(Int32, shifted) - reinterpret(Int32, 1.2582912f7) + Int32(127)) << 23)
end

"log(1 + y) for 0 ≤ y ≤ 1; Float32 by a polynomial, fitted at Chebyshev's points to 3e-8, relatively."
@inline log1p_unit(y) = log1p(y)
@inline log1p_unit(y::Float32) = y * by_pairs(y, (
    0.99999997f0, -0.499995f0, 0.3331927f0, -0.2484437f0, 0.19111431f0, -0.1367477f0, 0.078361668f0, -0.029588507f0, 0.0052534578f0,
))

@inline function sigmoid(a)
    e = decay(abs(a))
    return ifelse(a ≥ 0, one(a), e) / (one(a) + e)
end

@inline function forward(::Softplus, a)
    e = decay(abs(a))
    # `max` would take care of NaN, which e does.
    return ifelse(a > 0, a, zero(a)) + log1p_unit(e), ifelse(a ≥ 0, one(a), e) / (one(a) + e)
end
@inline bend(::Softplus, a, h, s, g, r) = g * (one(s) - s)

@inline function forward(::Tanh, a)
    e = decay(2abs(a))
    h = ifelse(abs(a) < 0.1, tanh_small(a), copysign((one(a) - e) / (one(a) + e), a))
    return h, one(h) - h * h
end
@inline bend(::Tanh, a, h, s, g, r) = -2h * g

"tanh(a) for |a| < 0.1, where 1 − e^{-2|a|} cancels: its continued fraction."
@inline function tanh_small(a)
    a² = a * a
    return a / (1 + a² / (3 + a² / (5 + a² / (7 + a² / (9 + a² / (11 + a² / 13))))))
end

@inline function forward(::SiLU, a)
    σ = sigmoid(a)
    return a * σ, σ * (1 + a * (1 - σ))
end
@inline function bend(::SiLU, a, h, s, g, r)
    σ = sigmoid(a)
    return r * (σ * (1 - σ) * (2 + a * (1 - 2σ)))
end

@inline normal_density(a) = exp(-a * a / 2) * oftype(a, 0.3989422804014327)
@inline normal_cdf(a) = erfc(-a * oftype(a, 0.7071067811865476)) / 2

@inline function forward(::GELU, a)
    Φ = normal_cdf(a)
    return a * Φ, Φ + a * normal_density(a)
end
@inline bend(::GELU, a, h, s, g, r) = r * (normal_density(a) * (2 - a * a))

@inline function forward(::ELU, a)
    e = decay(ifelse(a < 0, -a, zero(a)))
    τ = tanh_small(a / 2)  # e^a − 1 = 2τ / (1 − τ) with τ = tanh(a/2), where the difference cancels
    below = ifelse(a > -0.2, 2τ / (1 - τ), e - 1)
    return ifelse(a > 0, a, below), e
end
@inline bend(::ELU, a, h, s, g, r) = ifelse(h < 0, g, zero(g))

# --- what a potential's curvature takes: three derivatives, each a simple function of one root ---

"`log(2 cosh a)`, the antiderivative of tanh; of a potential alone."
struct LogCosh <: Activation end

"(φ(a), ρ): the value, and the root ρ of which `slope(φ, ρ)`, `bend(φ, ρ)` and `twist(φ, ρ)` are φ', φ'' and φ‴ at a."
@inline curve(::LogCosh, a) = (abs(a) + log1p_unit(decay(2abs(a))), first(forward(Tanh(), a)))
@inline curve(φ::Softplus, a) = forward(φ, a)
@inline curve(φ::Tanh, a) = (h = first(forward(φ, a)); (h, h))

@inline slope(::Union{LogCosh,Softplus}, ρ) = ρ
@inline slope(::Tanh, ρ) = one(ρ) - ρ * ρ
@inline bend(::LogCosh, ρ) = one(ρ) - ρ * ρ
@inline bend(::Softplus, ρ) = ρ * (one(ρ) - ρ)
@inline bend(φ::Tanh, ρ) = -2ρ * slope(φ, ρ)
@inline twist(φ::LogCosh, ρ) = -2ρ * bend(φ, ρ)
@inline twist(φ::Softplus, ρ) = bend(φ, ρ) * (one(ρ) - 2ρ)
@inline twist(φ::Tanh, ρ) = slope(φ, ρ) * (6ρ * ρ - 2)

const ACTIVATIONS = Dict(
    "softplus" => Softplus(), "tanh" => Tanh(), "silu" => SiLU(), "gelu" => GELU(), "elu" => ELU(),
)

const CURVES = Dict("logcosh" => LogCosh(), "softplus" => Softplus(), "tanh" => Tanh())

"`φ` by its name."
function activation(name, table=ACTIVATIONS)
    haskey(table, name) || throw(ArgumentError("unknown activation $(repr(name)); known: $(known(table))"))
    return table[name]
end

known(table) = join(sort!(collect(keys(table))), ", ")
