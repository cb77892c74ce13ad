# Dynamics that are the gradient of a potential (pyrnode/dynamics/potential.py and scalar.py; OT-Flow, Onken et al. 2021, eqs. 9 to 13).
# With s = (z, t), or s = z where time does not enter,
#
#   Φ(s) = wᵀN(s) + ½ sᵀAᵀA s + bᵀs       a_1 = W_1 s + b_1            u_1 = φ(a_1)
#   N(s) = u_L                            a_i = W_i u_{i-1} + b_i      u_i = u_{i-1} + h φ(a_i),  h = 1/(L − 1)
#
# The gradient runs back through the layers: y_L = w, v_i = h_i φ'(a_i) ⊙ y_i, y_{i-1} = y_i + W_iᵀv_i (h_1 = 1, no skip at layer 1),
#
#   ∇Φ = W_1ᵀv_1 + AᵀA s + b              ∇²Φ = Σ_i J_iᵀ diag(c_i) J_i + AᵀA,   c_i = h_i φ''(a_i) ⊙ y_i,   J_i = ∂a_i/∂z
#
# A context adds to a_1 and to b.

"""
    PotentialNetwork(dim, hidden=(64, 64); activation="logcosh", time=:concat, rank=10, initial=:identity, context=false)

Dynamics `f(z, t) = −∇_z Φ(z, t)` of OT-Flow's potential on vectors (dim, batch): `Φ(s) = wᵀN(s) + ½ sᵀAᵀA s + bᵀs` with s = (z, t)
and a residual network N (Onken et al. 2021, eqs. 9 and 10). Trace and norm of its Jacobian are exact, in closed form, where the probes are
the unit vectors (`RNODELayer` takes them by default), and it has the residual of the Hamilton-Jacobi equation (`hjb`).

# Arguments
- `dim`: dimension d of the state.
- `hidden`: the width of each layer of N, all the same; one layer or more.
- `activation`: `"logcosh"` (the antiderivative of tanh, OT-Flow's), `"softplus"` or `"tanh"`.
- `time`: `:concat`, s has the time; `:none`, Φ does not change in time.
- `rank`: rows of A; at most as many as s has numbers are made.
- `initial`: `:identity`, w = b = 0 and A of the size 1e-3, so that f is zero but for a few millionths of z; `:ot_flow`, w of ones, b
  zero, A by Xavier, as in OT-Flow's code.
- `context`: whether it takes an embedded context, of length [`context_length`](@ref RNODE.context_length).

Throws `ArgumentError` for widths that differ and for what is not among these. [`potential`](@ref) gives Φ itself.
"""
struct PotentialNetwork <: Dynamics
    dim::Int
    width::Int
    depth::Int
    φ::Activation  # not part of the type, so that what is not a loop over numbers is compiled once for all
    timed::Bool
    rank::Int
    initial::Symbol
    context::Bool
end

function PotentialNetwork(
    dim::Integer, hidden=(64, 64);
    activation="logcosh", time::Symbol=:concat, rank::Integer=10, initial::Symbol=:identity, context::Bool=false,
)
    dim ≥ 1 || throw(ArgumentError("dim = $dim: expected at least 1"))
    fits = !isempty(hidden) && minimum(hidden) ≥ 1 && allequal(hidden)
    fits || throw(ArgumentError("hidden = $hidden: the layers of a potential add to one another, so give one positive width for all, e.g. (64, 64)"))
    time in (:none, :concat) || throw(ArgumentError("unknown time entry $(repr(time)) of a potential; known: :concat, :none"))
    rank ≥ 1 || throw(ArgumentError("rank = $rank: expected at least 1"))
    initial in (:identity, :ot_flow) || throw(ArgumentError("initial = $(repr(initial)): expected :identity or :ot_flow"))
    inputs = dim + (time === :concat)
    return PotentialNetwork(
        Int(dim), Int(first(hidden)), length(hidden), RNODE.activation(activation, CURVES), time === :concat,
        Int(min(rank, inputs)), initial, context,
    )
end

"Numbers in s."
inputs(network::PotentialNetwork) = network.dim + network.timed

"`h_i`, the weight of layer `i` in what the layers add up to."
weight_of(network::PotentialNetwork, i) = i == 1 ? 1.0 : 1 / (network.depth - 1)

context_length(network::PotentialNetwork) = network.context ? network.width + inputs(network) : 0
closed_trace(::PotentialNetwork) = true
has_potential(::PotentialNetwork) = true

"Parameters of Φ, or their gradients: parts of a flat vector, W_1, b_1, …, W_L, b_L, w, A, b; the maps as (in, out), as torch's are here."
struct PotentialSlices{V,M}
    weights::Vector{M}
    biases::Vector{V}
    w::V
    A::M
    b::V
end

"Where they lie in the flat vector."
function places(network::PotentialNetwork)
    s, m, L = inputs(network), network.width, network.depth
    lengths = [s * m; m; repeat([m * m, m], L - 1); m; s * network.rank; s]
    ends = cumsum(lengths)
    return [(stop - n + 1):stop for (stop, n) in zip(ends, lengths)]
end
ChainRulesCore.@non_differentiable places(::PotentialNetwork)

"`part(θ, range)` gives a part of θ, by default on the same memory."
function PotentialSlices(network::PotentialNetwork, θ, part=piece)
    s, m, L, places_of = inputs(network), network.width, network.depth, places(network)
    weights = map(i -> reshape(part(θ, places_of[2i - 1]), i == 1 ? s : m, m), 1:L)
    biases = map(i -> part(θ, places_of[2i]), 1:L)
    w, A, b = map(i -> part(θ, places_of[2L + i]), (1, 2, 3))
    return PotentialSlices(weights, biases, w, reshape(A, s, network.rank), b)
end

LuxCore.parameterlength(network::PotentialNetwork) = last(last(places(network)))

"The layers' as PyTorch's own default, uniform within 1/√fan-in; w, A and b as `initial` says."
function LuxCore.initialparameters(rng::AbstractRNG, network::PotentialNetwork)
    θ = zeros(Float32, LuxCore.parameterlength(network))
    p = PotentialSlices(network, θ)
    draw!(part, bound) = (part .= bound .* (2 .* Random.rand!(rng, similar(part)) .- 1))
    for (weight, bias) in zip(p.weights, p.biases)
        draw!(weight, 1 / sqrt(size(weight, 1)))
        draw!(bias, 1 / sqrt(size(weight, 1)))
    end
    # At zero AᵀA has no slope, and A would stay there.
    draw!(p.A, network.initial === :identity ? 1.0e-3 : sqrt(6 / sum(size(p.A))))
    network.initial === :ot_flow && fill!(p.w, 1)
    return (; θ)
end

"""
    potential(network, θ, t, z; context=nothing)

Φ at time `t` of the states `z` (dim, batch), of conditional networks with the embedded `context` (s, batch): (batch). Differentiable by
Zygote; [`integrate`](@ref) does not need it.
"""
function potential(network::PotentialNetwork, θ, t, z; context=nothing)
    check_sizes(network, (network.dim,), θ, z)
    check_context(network, context, size(z, 2))
    p, m = PotentialSlices(network, θ, getindex), network.width
    s = network.timed ? vcat(z, zero(z[1:1, :]) .+ t) : z
    value(a) = first.(curve.(Ref(network.φ), a))
    shift(a) = context === nothing ? a : a .+ context[1:m, :]
    u = value(shift(transpose(p.weights[1]) * s .+ p.biases[1]))
    for i in 2:(network.depth)
        u = u .+ eltype(z)(weight_of(network, i)) .* value(transpose(p.weights[i]) * u .+ p.biases[i])
    end
    slope = context === nothing ? p.b : p.b .+ context[(m + 1):end, :]
    return vec(transpose(p.w) * u) .+ vec(sum(abs2, transpose(p.A) * s; dims=1)) ./ 2 .+ vec(sum(slope .* s; dims=1))
end

# --- bound: f, and ∂Φ/∂t − ½‖∇Φ‖² ---

"What an evaluation of ∇Φ leaves for its pullback: matrices of as many columns as samples."
struct PotentialTape{A<:AbstractArray}
    s::A
    u::Vector{A}      # of all layers but the last, whose value is Φ's alone
    ρ::Vector{A}      # the activations' roots
    y::Vector{A}      # the last is w for every sample, and the same for every tape
    v::Vector{A}
    As::A
    G::A              # ∇Φ in s
    f::A
    hjb::A            # (1, batch)
end

"Memory that one evaluation and its pullback take for themselves, and the next ones again."
struct PotentialWork{A<:AbstractArray}
    c::Vector{A}      # c_i
    ab::Vector{A}     # ā_i
    yb::Vector{A}     # ȳ_i, from the curvature
    s::Vector{A}      # three like s
    m::Vector{A}      # two like a
    AG::A             # like A s
    along::Vector{A}  # (m, batch k): one for each layer and two, or three for the Jacobians
    η::Vector{A}      # two like s, along the probes
    Aη::A
    M::A              # like the Hessian
end

"A network with its parameters and memory, but for what the curvature leaves."
struct PotentialCore{T,A<:AbstractArray,P<:PotentialSlices}
    network::PotentialNetwork
    h::Vector{T}
    layers::Vector{Any}  # the maps W_i; likewise not part of the type, and what their products return is not looked at
    A::Any
    named::P
    bars::P
    tape::PotentialTape{A}
    work::PotentialWork{A}
end

"A `PotentialNetwork`, bound."
struct BoundPotential{C<:PotentialCore,K,V}
    core::C
    curvature::K         # `Products`, `Jacobians`, or `nothing`
    θ::V
    θ̄::V
    asked::Asked
end

function sample_bytes(network::PotentialNetwork, z0, asked::Asked)
    each = 8 + (asked.closed ? 3 : 7) * asked.probes
    return sizeof(eltype(z0)) * network.width * network.depth * each
end

function bind(network::PotentialNetwork, θ, z0, asked::Asked)
    check_sizes(network, (network.dim,), θ, z0)
    θ̄ = fill!(similar(θ), false)
    named, bars = PotentialSlices(network, θ), PotentialSlices(network, θ̄)
    layers = Any[dense(W, W̄) for (W, W̄) in zip(named.weights, bars.weights)]
    h = [eltype(z0)(weight_of(network, i)) for i in 1:(network.depth)]
    return bound_potential(network, h, layers, dense(named.A, bars.A), named, bars, θ, θ̄, z0, asked)
end

function another(bound::BoundPotential, z0)
    core = bound.core
    return bound_potential(
        core.network, core.h, core.layers, core.A, core.named, core.bars, bound.θ, bound.θ̄, z0, bound.asked,
    )
end

function bound_potential(network, h, layers, A, named, bars, θ, θ̄, z0, asked)
    batch, array = size(z0, 2), array_like(z0)
    y = array(network.width, batch)
    y .= named.w
    core = PotentialCore(
        network, h, layers, A, named, bars, PotentialTape(array, network, batch, y), PotentialWork(array, network, batch, asked),
    )
    fixed = asked.closed ? fixed_curvature(array, network, named, batch) : (y, y)
    return BoundPotential(core, curvature_of(array, network, batch, asked, fixed), θ, θ̄, asked)
end

"A tape in the arrays that `array(rows, columns)` gives; `y` is w for every sample."
function PotentialTape(array, network::PotentialNetwork, batch, y)
    s, m, L = inputs(network), network.width, network.depth
    arrays(n) = [array(m, batch) for _ in 1:n]
    return PotentialTape(
        array(s, batch), arrays(L - 1), arrays(L), [arrays(L - 1); [y]], arrays(L), array(network.rank, batch), array(s, batch),
        array(network.dim, batch), array(1, batch),
    )
end

"What the curvature that is asked for will leave; `fixed` is what [`fixed_curvature`](@ref) gives."
function curvature_of(array, network, batch, asked::Asked, fixed)
    asked.probes == 0 && return nothing
    return asked.closed ? Jacobians(array, network, batch, fixed...) : Products(array, network, batch * asked.probes)
end

function PotentialWork(array, network::PotentialNetwork, batch, asked::Asked)
    s, m, L, r = inputs(network), network.width, network.depth, network.rank
    arrays(n, columns) = [array(m, columns) for _ in 1:n]
    along = batch * asked.probes
    probed, closed = asked.closed ? (0, along) : (along, 0)
    return PotentialWork(
        arrays(L, batch), arrays(L, batch), arrays(L, batch), [array(s, batch) for _ in 1:3], arrays(2, batch), array(r, batch),
        arrays(asked.closed ? 3 : L + 2, along), [array(s, probed) for _ in 1:2], array(r, probed), array(network.dim, closed),
    )
end

function keeping(bound::BoundPotential, memory)
    core, own = bound.core, bound.core.tape
    array(rows, columns) = take!(memory, own.f, (rows, columns))
    tape = PotentialTape(array, core.network, size(own.f, 2), own.y[end])
    curvature = curvature_of(array, core.network, size(own.f, 2), bound.asked, fixed_part(bound.curvature))
    kept = PotentialCore(core.network, core.h, core.layers, core.A, core.named, core.bars, tape, core.work)
    return BoundPotential(kept, curvature, bound.θ, bound.θ̄, bound.asked)
end

function kept_bytes(bound::BoundPotential)
    counter = Counter()
    keeping(bound, counter)
    return counter.bytes
end

function evaluate!(bound::BoundPotential, t, z, c, ε, ::Bool)
    core = bound.core
    in_rows!(core.tape.s, z, t)
    slopes!(core, c)
    ε === nothing && return Evaluation(core.tape.f)
    bound.asked.hjb && residual!(core.tape.hjb, core.tape.G, core.tape.f)
    curve!(core, bound.curvature, ε)
    return evaluated!(bound, c)
end

function evaluated!(bound::BoundPotential, c)
    tape = bound.core.tape
    bound.curvature === nothing && return Evaluation(tape.f)
    return seen(tape, bound.curvature, bound.asked.hjb ? tape.hjb : nothing)
end

"∇Φ in s, and f: once forward through the layers, and once back."
function slopes!(core::PotentialCore, c)
    tape, φ, L = core.tape, core.network.φ, length(core.layers)
    for i in 1:L
        before = i == 1 ? tape.s : tape.u[i - 1]
        apply!(tape.ρ[i], core.layers[i], before)
        i == 1 && add_rows!(tape.ρ[1], c, 0)
        enter!(φ, i == L ? nothing : tape.u[i], tape.ρ[i], i == 1 ? nothing : before, core.named.biases[i], core.h[i])
    end
    for i in L:-1:1
        sloped!(tape.v[i], φ, core.h[i], tape.ρ[i], tape.y[i])
        i == 1 && break
        transpose!(tape.y[i - 1], core.layers[i], tape.v[i])
        each!(+, tape.y[i - 1], tape.y[i - 1], tape.y[i])
    end
    transpose!(tape.G, core.layers[1], tape.v[1])
    apply!(tape.As, core.A, tape.s)
    transpose!(core.work.s[1], core.A, tape.As)
    finish_slopes!(tape.G, tape.f, core.work.s[1], core.named.b)
    add_rows!(tape.G, c, core.network.width)
    c === nothing || from_rows!(-, tape.f, tape.G)
    return nothing
end

function finish_slopes!(G, f, AAs, b)
    G .+= AAs .+ b
    from_rows!(-, f, G)
    return nothing
end

function residual!(hjb, G, f)
    hjb .= sum(abs2, f; dims=1) ./ -2
    size(G, 1) > size(f, 1) && (hjb .+= view(G, size(G, 1):size(G, 1), :))
    return nothing
end

"x ← x + the rows of the context c after the first `skip`."
add_rows!(x, ::Nothing, skip) = nothing
add_rows!(x, c, skip) = (x .+= view(c, (skip + 1):(skip + size(x, 1)), :); nothing)

"(s, batch) ← (d, batch), and t below it where there is a row for it."
function in_rows!(out, x, t)
    d = size(x, 1)
    view(out, 1:d, :) .= x
    size(out, 1) > d && fill!(view(out, d + 1, :), t)
    return nothing
end

"out (d, batch) ← op(the first rows of x...)."
from_rows!(op, out, xs...) = (out .= op.(map(x -> view(x, axes(out, 1), :), xs)...); nothing)

"u ← u' + h φ(a + β), of the first layer φ(a + β) alone; and a gives way to the root."
function enter!(φ, u, a, before, bias, h)
    a .+= bias
    u === nothing || (u .= (before === nothing ? false : before) .+ h .* first.(curve.(Ref(φ), a)))
    a .= last.(curve.(Ref(φ), a))
    return nothing
end

function enter!(φ, u, a::Matrix, before, bias::Vector, h)
    @inbounds for j in axes(a, 2)
        @simd ivdep for i in axes(a, 1)
            value, root = curve(φ, a[i, j] + bias[i])
            a[i, j] = root
            u === nothing || (u[i, j] = before === nothing ? value : muladd(h, value, before[i, j]))
        end
    end
    return nothing
end
