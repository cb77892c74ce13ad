# What data go through before the blocks, in double precision whatever these compute in (pyrnode's transforms.py, edges.py, radial.py).
# Each takes samples (d, batch), and gives them and the logarithms of the determinants of its Jacobians, (batch).

abstract type Transform end

"Of how many columns a transform is; `nothing` where any number will do."
dimensions(::Transform) = nothing

"""
`y = Rᵀ((x − mean)/std)/scale`, where the rotation `R` may be `nothing` (pyrnode's Standardize and Whiten).
"""
struct Affine <: Transform
    mean::Vector{Float64}
    std::Vector{Float64}
    rotation::Union{Nothing,Matrix{Float64}}
    scale::Vector{Float64}
end

dimensions(a::Affine) = length(a.mean)

Affine(mean, std) = Affine(mean, std, nothing, ones(length(mean)))
Affine(dim::Integer) = Affine(zeros(dim), ones(dim))

function (a::Affine)(x)
    y = (x .- a.mean) ./ a.std
    y = (a.rotation === nothing ? y : transpose(a.rotation) * y) ./ a.scale
    return y, fill(-sum(log, a.std) - sum(log, a.scale), size(x, 2))
end

function invert(a::Affine, y)
    y = y .* a.scale
    return a.mean .+ a.std .* (a.rotation === nothing ? y : a.rotation * y)
end

"`y = c f(κ|x|²) x`, `f(q) = asinh(√q)/√q`: draws tails in along the radius (pyrnode's Radial)."
struct Radial <: Transform
    scale::Float64
    curvature::Float64
end

shrunk(q) = q < 1e-3 ? 1 - q * (1 / 6 - q * (3 / 40 - q * (5 / 112 - q * (35 / 1152 - q * 63 / 2816)))) : asinh(sqrt(q)) / sqrt(q)
grown(q) = q < 1e-3 ? 1 + q * (1 / 6 + q * (1 / 120 + q * (1 / 5040 + q / 362880))) : sinh(sqrt(q)) / sqrt(q)

function (r::Radial)(x)
    d, q = size(x, 1), r.curvature .* vec(sum(abs2, Float64.(x); dims=1))
    f = shrunk.(q)
    return r.scale .* transpose(f) .* x, d * log(r.scale) .+ (d - 1) .* log.(f) .- log1p.(q) ./ 2
end

function invert(r::Radial, y)
    y = y ./ r.scale
    return transpose(grown.(r.curvature .* vec(sum(abs2, y; dims=1)))) .* y
end

"Opens out sharp edges of columns, where their softness is positive (pyrnode's Edges, which has the formulas)."
struct Edges <: Transform
    low::Vector{Float64}
    high::Vector{Float64}
    width::Vector{Float64}
    soft_low::Vector{Float64}
    soft_high::Vector{Float64}
end

dimensions(e::Edges) = length(e.low)

const SLOPE = sqrt(π / 8)
const BEND = SLOPE^4 / 4
const FARTHEST = 1e100

function softened(u, s)
    root = hypot(u, s)
    return (u > 0 ? u + root : s^2 / (abs(u) + root)) / 2, root
end

"A number of column `i`, and the logarithm of its slope there."
function opened(e::Edges, i, x::Float64)
    s, t = e.soft_low[i], e.soft_high[i]
    s == 0 == t && return x, 0.0
    sign, start, soft = s > 0 ? (1, e.low[i], s) : (-1, e.high[i], t)
    u = sign * (x - start) / e.width[i]
    out = !(abs(u) ≤ FARTHEST)
    u = out ? 0.5 : u
    p, root = softened(u, soft)
    if s > 0 && t > 0
        q, other = softened(1 - u, t)
        logit, slope = log(p) - log(q), 1 / root + 1 / other
    else
        left = -expm1(-p)
        logit, slope = p + log(left), p / root / left
    end
    bent = 1 + BEND * logit^2
    fourth = sqrt(sqrt(bent))
    return sign * SLOPE * logit / fourth, out ? -Inf : log(slope * SLOPE * (1 + bent) / (2 * fourth * bent) / e.width[i])
end

function closed(e::Edges, i, y::Float64)
    s, t = e.soft_low[i], e.soft_high[i]
    s == 0 == t && return y
    sign, start, soft = s > 0 ? (1, e.low[i], s) : (-1, e.high[i], t)
    y *= sign
    logit = max(y * sqrt((BEND * y^2 + sqrt(BEND^2 * y^4 + 4 * SLOPE^4)) / (2 * SLOPE^4)), -600.0)
    if s > 0 && t > 0
        ratio = exp(min(logit, 600.0))
        part = 1 + 1 / ratio
        p = (1 + sqrt(1 + part * (s^2 + t^2 * ratio))) / (2 * part)
    else
        p = max(logit, 0.0) + log1p(exp(-abs(logit)))
    end
    return start + sign * e.width[i] * (p - soft^2 / (4p))
end

function (e::Edges)(x)
    y, log_determinants = zeros(size(x)), zeros(size(x, 2))
    for j in axes(x, 2), i in axes(x, 1)
        y[i, j], slope = opened(e, i, Float64(x[i, j]))
        log_determinants[j] += slope
    end
    return y, log_determinants
end

invert(e::Edges, y) = [closed(e, i, Float64(y[i, j])) for i in axes(y, 1), j in axes(y, 2)]
