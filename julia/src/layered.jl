# Networks of layers with an explicit vector-Jacobian product (pyrnode/dynamics/layered.py):
#
#   a_i = s_i ⊙ W_i h_{i-1} + β_i (s and β by time and context),  h_i = φ(a_i),  h_0 = z,  f = a_L
#   product:   g_L = ε,  r_{i-1} = W_iᵀ(s_i ⊙ g_i),  g_i = φ'(a_i) ⊙ r_i,  w = r_0 = εᵀ∂f/∂z
#   pullback of (f̄, w̄): first the product's transpose, which runs forward (p_0 = w̄, ḡ_i = s_i ⊙ W_i p_{i-1},
#   p_i = φ'(a_i) ⊙ ḡ_i), then the network's, which runs back (ā_L = f̄, ā_i = φ'(a_i) ⊙ h̄_i + φ''(a_i) ⊙ Σ_k r_i ⊙ ḡ_i,
#   h̄_{i-1} = W_iᵀ(s_i ⊙ ā_i)). The weights' gradients are Σ ā hᵀ + Σ g pᵀ: six products with W in all.

"A stack of layers with one activation between them; made by [`MLP`](@ref) and [`ConvNet`](@ref)."
struct Layered{Φ<:Activation,Time,N,C} <: Dynamics
    specs::Vector{LayerSpec}
    φ::Φ
    time::Val{Time}
    space::Val{N}   # dimensions of the convolution; 0 for dense layers
    context::Val{C} # whether there is a context
    event::Tuple{Vararg{Int}}
end

function Layered(widths, kernel_size, size, activation_name, time, event, context)
    time in (:none, :concat, :concatsquash) ||
        throw(ArgumentError("unknown time entry $(repr(time)); known: :concat, :concatsquash, :none"))
    specs, offset = LayerSpec[], 0
    for (inputs, outputs) in zip(widths[1:(end - 1)], widths[2:end])
        push!(specs, LayerSpec(inputs, outputs, kernel_size, size, time, offset))
        offset += length(last(specs))
    end
    return Layered(specs, activation(activation_name), Val(time), Val(kernel_size == 0 ? 0 : 2), Val(context), event)
end

"""
    MLP(dim, hidden=(64, 64, 64); activation="softplus", time=:concat, context=false)

A multilayer perceptron on vectors (dim, batch). With `context`, it takes an embedded context of length [`context_length`](@ref RNODE.context_length).

# Example
```jldoctest
julia> using Lux, RNODE

julia> Lux.parameterlength(MLP(2, (64, 64, 64)))
8836
```
"""
MLP(dim::Integer, hidden=(64, 64, 64); activation="softplus", time::Symbol=:concat, context::Bool=false) =
    Layered((dim, hidden..., dim), 0, (1, 1), activation, time, (Int(dim),), context)

"""
    ConvNet((W, H, C), hidden=(64, 64, 64); activation="softplus", time=:concat, kernel_size=3, context=false)

The paper's convolutional network on images (W, H, C, batch): same-size convolutions with stride 1; `context` as in [`MLP`](@ref).
"""
function ConvNet(
    event, hidden=(64, 64, 64); activation="softplus", time::Symbol=:concat, kernel_size::Integer=3, context::Bool=false,
)
    isodd(kernel_size) || throw(ArgumentError("kernel_size = $kernel_size: expected an odd number"))
    width, height, channels = event
    return Layered((channels, hidden..., channels), Int(kernel_size), (width, height), activation, time, Tuple(event), context)
end

context_length(dynamics::Layered{<:Any,<:Any,<:Any,true}) =
    sum(spec.outputs * context_parts(spec.time) for spec in dynamics.specs)

LuxCore.parameterlength(dynamics::Layered) = sum(length, dynamics.specs)

"PyTorch's own default, uniform within 1/√fan-in with time counted as an input; the last layer zero, so that f = 0."
function LuxCore.initialparameters(rng::AbstractRNG, dynamics::Layered)
    θ = zeros(Float32, LuxCore.parameterlength(dynamics))
    for spec in dynamics.specs[1:(end - 1)]
        bound = 1 / sqrt(taps(spec) * (spec.inputs + (spec.time === :concat)))
        parts = Slices(spec, θ)
        for (name, _) in parameter_lengths(spec)
            limit, part = name in (:gate_weight, :gate_bias, :time_shift) ? 1.0 : bound, getfield(parts, name)
            part .= limit .* (2 .* Random.rand!(rng, similar(part)) .- 1)
        end
    end
    return (; θ)
end

function sample_bytes(dynamics::Layered, z0, asked::Asked)
    channels = sum(spec.inputs for spec in dynamics.specs)
    return sizeof(eltype(z0)) * pixels(dynamics.specs[1]) * channels * (5 + (2 + keeps(dynamics.φ)) * asked.probes)
end

"What an evaluation leaves for its pullback."
struct Tape{A<:AbstractArray}
    t::Base.RefValue{Float64}
    h::Vector{A}      # input of each layer
    a::Vector{A}      # W h, and after the activation its input a; the last is f
    y::Vector{A}      # W h, kept where there is a scale to differentiate
    s::Vector{A}      # φ'(a), for all layers but the last
    g::Vector{A}      # g; the last is ε
    gs::Vector{A}     # s ⊙ g, what Wᵀ is applied to; overwritten in the pullback
    r::Vector{A}      # Wᵀ(s ⊙ g); the first is w
end

"""
A tape for `columns` samples and `k` probes, in the arrays that `array(channels, columns)` gives. What need not be kept for the
pullback is that of `other`, if there is one.
"""
function Tape(array, dynamics::Layered, columns, k, other=nothing)
    inputs, outputs = [spec.inputs for spec in dynamics.specs], [spec.outputs for spec in dynamics.specs]
    hidden, squash, probes = outputs[1:(end - 1)], has_scale(dynamics), columns * k
    arrays(channels, columns) = [array(n, columns) for n in channels]
    r = arrays(inputs, probes)
    g = [keeps(dynamics.φ) ? arrays(hidden, probes) : r[2:end]; arrays(outputs[end:end], probes)]
    spare = other !== nothing && !keeps(dynamics.φ)
    a = [spare ? other.a[1:(end - 1)] : arrays(hidden, columns); arrays(outputs[end:end], columns)]
    y = squash ? arrays(outputs, columns) : a
    gs = !squash ? g : other === nothing ? arrays(outputs, probes) : other.gs
    return Tape(Ref(0.0), arrays(inputs, columns), a, y, arrays(hidden, columns), g, gs, r)
end

has_scale(dynamics::Layered) = dynamics.time === Val(:concatsquash)

"A `Layered`, bound: its layers, and the memory of one evaluation and its pullback."
struct BoundLayers{D<:Layered,A<:AbstractArray,Φ<:Activation,L,E,P,V}
    dynamics::D
    specs::Vector{LayerSpec}
    φ::Φ
    layers::Vector{L}
    entries::Vector{E}
    context::Vector{UnitRange{Int}}  # each layer's part of the embedded context
    parameter_bars::Vector{P}
    θ::V
    θ̄::V
    tape::Tape{A}
    gb::Vector{A}     # ḡ, and then p
    ab::Vector{A}     # ā
    as::Vector{A}     # s ⊙ ā
    hb::Vector{A}     # h̄; the first is z̄
    p::Vector{A}      # w̄, laid out for the layers
    f̄::Vector{A}
    k::Int
end

function bind(dynamics::Layered, θ, z0, asked::Asked)
    specs = dynamics.specs
    check_sizes(dynamics, dynamics.event, θ, z0)
    θ̄ = fill!(similar(θ), false)
    named, bars = [Slices(spec, θ) for spec in specs], [Slices(spec, θ̄) for spec in specs]
    layers = [linear(dynamics.space, specs[i], named[i].weight, bars[i].weight) for i in eachindex(specs)]
    entries = [time_entry(dynamics.time, specs[i], named[i], bars[i]) for i in eachindex(specs)]
    return bound_layers(dynamics, layers, entries, bars, θ, θ̄, z0, asked.probes)
end

"Throws where parameters and states are not those of dynamics whose states have the size `event`."
function check_sizes(dynamics, event, θ, z0)
    eltype(θ) === eltype(z0) || throw(ArgumentError("parameters are $(eltype(θ)) and the state is $(eltype(z0)): convert one of them"))
    length(θ) == LuxCore.parameterlength(dynamics) ||
        throw(DimensionMismatch("$(length(θ)) parameters: expected $(LuxCore.parameterlength(dynamics))"))
    size(z0)[1:(end - 1)] == event || throw(DimensionMismatch("state of size $(size(z0)): expected $event and the batch"))
    return nothing
end

another(bound::BoundLayers, z0) = bound_layers(
    bound.dynamics, bound.layers, without_context.(bound.entries), bound.parameter_bars, bound.θ, bound.θ̄, z0, bound.k,
)

function bound_layers(dynamics::Layered, layers, plain, bars, θ, θ̄, z0, k)
    specs, batch = dynamics.specs, size(z0, ndims(z0))
    entries = contextual(dynamics.context, specs, plain, batch)
    ends = cumsum([spec.outputs * context_parts(spec.time) for spec in specs])
    context = [(last - spec.outputs * context_parts(spec.time) + 1):last for (spec, last) in zip(specs, ends)]
    array = array_like(z0)
    outputs(columns) = [array(spec.outputs, columns) for spec in specs]
    hidden(columns) = outputs(columns)[1:(end - 1)]
    squash, probes = has_scale(dynamics), batch * k
    tape = Tape(array, dynamics, batch, k)
    return BoundLayers(
        dynamics, specs, dynamics.φ, layers, entries, context, bars, θ, θ̄, tape, squash ? outputs(probes) : hidden(probes),
        hidden(batch), squash ? outputs(batch) : empty(tape.a), [array(spec.inputs, batch) for spec in specs],
        [array(specs[1].inputs, probes)], [array(specs[end].outputs, batch)], k,
    )
end

array_like(z0) = (channels, columns) -> similar(z0, Base.front(Base.front(size(z0)))..., channels, columns)

function keeping(bound::BoundLayers, memory)
    like = bound.f̄[1]
    space, batch = Base.front(Base.front(size(like))), size(like, ndims(like))
    array(channels, columns) = take!(memory, like, (space..., channels, columns))
    tape = Tape(array, bound.dynamics, batch, bound.k, bound.tape)
    return BoundLayers(
        bound.dynamics, bound.specs, bound.φ, bound.layers, bound.entries, bound.context, bound.parameter_bars, bound.θ,
        bound.θ̄, tape, bound.gb, bound.ab, bound.as, bound.hb, bound.p, bound.f̄, bound.k,
    )
end

function kept_bytes(bound::BoundLayers)
    counter = Counter()
    keeping(bound, counter)
    return counter.bytes
end

function evaluated!(bound::BoundLayers, c)
    tape, T = bound.tape, eltype(bound.θ)
    has_scale(bound.dynamics) && for i in eachindex(bound.layers)
        at!(bound.entries[i], bound.specs[i], T(tape.t[]), context_of(bound, c, i))
        bound.k == 0 || scale_probes!(bound, i)
    end
    f = matrix(tape.a[end])
    return bound.k == 0 ? Evaluation(f) : Evaluation(f; w=probes(bound, tape.r[1]))
end

without_context(entry::TimeEntry) = entry
without_context(entry::ContextEntry) = entry.entry

contextual(::Val{false}, specs, entries, batch) = entries
contextual(::Val{true}, specs, entries, batch) = [
    with_context(entry, similar(entry.shift, pixels(spec) * spec.outputs, batch)) for (entry, spec) in zip(entries, specs)
]

"Layer `i`'s part of the embedded context."
context_of(bound::BoundLayers, ::Nothing, i) = nothing
context_of(bound::BoundLayers, c, i) = view(c, bound.context[i], :)

function evaluate!(bound::BoundLayers, t, z, c, ε, tape::Bool)
    last, tape = length(bound.layers), bound.tape
    tape.t[] = t
    copyto!(tape.h[1], z)
    for i in 1:last
        entry = bound.entries[i]
        shift = at!(entry, bound.specs[i], eltype(z)(t), context_of(bound, c, i))
        apply!(tape.y[i], bound.layers[i], tape.h[i])
        a, y = matrix(tape.a[i]), matrix(tape.y[i])
        if i < last
            activate!(bound.φ, matrix(tape.h[i + 1]), matrix(tape.s[i]), a, y, scale(entry), shift)
        else
            affine!(a, y, scale(entry), shift)
        end
    end
    f = matrix(tape.a[last])
    ε === nothing && return Evaluation(f)
    copyto!(tape.g[last], ε)
    return Evaluation(f; w=product!(bound))
end

"w = εᵀ∂f/∂z, (event, batch, k)."
function product!(bound::BoundLayers)
    tape = bound.tape
    for i in length(bound.layers):-1:1
        tape.gs === tape.g || scale_probes!(bound, i)
        transpose!(tape.r[i], bound.layers[i], tape.gs[i])
        i == 1 && break
        r = probes(bound, tape.r[i])
        # One array in place of two that share memory: a broadcast would copy it first.
        g = tape.g[i - 1] === tape.r[i] ? r : probes(bound, tape.g[i - 1])
        by_probe!(*, g, r, matrix(tape.s[i - 1]))
    end
    return probes(bound, tape.r[1])
end

scale_probes!(bound, i) =
    by_probe!(*, probes(bound, bound.tape.gs[i]), probes(bound, bound.tape.g[i]), scale(bound.entries[i]))

"(event..., batch k) as (event, batch, k)."
function probes(bound::BoundLayers, x)
    m = matrix(x)
    return reshape(m, size(m, 1), :, bound.k)
end

function pullback!(bound::BoundLayers, z̄, c̄, bars::Cotangents, α)
    w̄ = bars.w
    w̄ === nothing ? foreach(x -> fill!(x, false), bound.ab) : pull_product!(bound, w̄, α)
    last, tape, T = length(bound.layers), bound.tape, eltype(bound.θ̄)
    t = T(tape.t[])
    a_bar = copyto!(bound.f̄[1], bars.f)
    for i in last:-1:1
        layer, entry, spec = bound.layers[i], bound.entries[i], bound.specs[i]
        s = scale(entry)
        scaled = a_bar
        if s !== nothing
            scaled = bound.as[i]
            matrix(scaled) .= matrix(a_bar) .* s
        end
        s_bar = s === nothing ? nothing : scale_bar(bound, i, a_bar, w̄ !== nothing)
        accumulate!(entry, spec, t, matrix(a_bar), s_bar, T(α), context_of(bound, c̄, i))
        accumulate!(layer, tape.h[i], scaled, T(α))
        transpose!(bound.hb[i], layer, scaled)
        if i > 1
            a_bar = bound.ab[i - 1]
            add_product!(matrix(a_bar), matrix(bound.hb[i]), matrix(tape.s[i - 1]))
        end
    end
    return copyto!(z̄, matrix(bound.hb[1]))
end

"The transpose of the product: ā of the hidden layers begins with φ'' ⊙ Σ_k r ⊙ ḡ."
function pull_product!(bound::BoundLayers, w̄, α)
    last, tape, T = length(bound.layers), bound.tape, eltype(bound.θ̄)
    p = copyto!(bound.p[1], w̄)
    for i in 1:last
        layer = bound.layers[i]
        accumulate!(layer, p, tape.gs[i], T(α))
        i > length(bound.gb) && break  # ε is held constant: nothing is asked of the last product but its weight
        ḡ = apply!(bound.gb[i], layer, p)
        tape.gs === tape.g || scale_product!(bound, i)
        if i < last
            bend!(
                matrix(bound.ab[i]), probes(bound, ḡ), bound.φ, matrix(tape.a[i]), matrix(tape.h[i + 1]),
                matrix(tape.s[i]), probes(bound, tape.g[i]), probes(bound, tape.r[i + 1]),
            )
            p = ḡ
        end
    end
    return nothing
end

"With a scale: what ḡ gives the scale's cotangent is kept in place of s ⊙ g, and ḡ is scaled."
function scale_product!(bound::BoundLayers, i)
    ḡ, tape = matrix(bound.gb[i]), bound.tape
    matrix(tape.gs[i]) .= ḡ .* matrix(tape.g[i])
    probes(bound, bound.gb[i]) .*= scale(bound.entries[i])
    return nothing
end

"The cotangent of a layer's scale, elementwise (event, batch): from the layer itself, and from the product."
function scale_bar(bound::BoundLayers, i, a_bar, product)
    s_bar = matrix(a_bar) .* matrix(bound.tape.y[i])
    product && (s_bar .+= dropdims(sum(probes(bound, bound.tape.gs[i]); dims=3); dims=3))
    return s_bar
end

function gradient!(θ̄, bound::BoundLayers)
    foreach((entry, spec, p̄) -> finish!(entry, spec, p̄), bound.entries, bound.specs, bound.parameter_bars)
    θ̄ .+= bound.θ̄
    fill!(bound.θ̄, false)
    return θ̄
end

# --- elementwise work: broadcasts for any array, loops of vector instructions for a CPU's ---

affine!(a, y, scale, shift) = (a .= scale === nothing ? y .+ shift : y .* scale .+ shift; nothing)

"a ← s ⊙ y + β, (h, φ') ← (φ(a), φ'(a))."
function activate!(φ, h, slope, a, y, scale, shift)
    affine!(a, y, scale, shift)
    h .= (x -> first(forward(φ, x))).(a)
    slope .= (x -> last(forward(φ, x))).(a)
    return nothing
end

function affine!(a::Matrix, y::Matrix, scale, shift::VecOrMat)
    @inbounds for j in axes(a, 2)
        @simd ivdep for i in axes(a, 1)
            β = entry_at(shift, i, j)
            a[i, j] = scale === nothing ? y[i, j] + β : muladd(y[i, j], entry_at(scale, i, j), β)
        end
    end
    return nothing
end

"The entry of scale or shift for pixel and channel `i` of sample `j`."
entry_at(x::Vector, i, j) = @inbounds x[i]
entry_at(x::Matrix, i, j) = @inbounds x[i, j]

function activate!(φ, h::Matrix, slope::Matrix, a::Matrix, y::Matrix, scale, shift::VecOrMat)
    @inbounds for j in axes(a, 2)
        @simd ivdep for i in axes(a, 1)
            β = entry_at(shift, i, j)
            x = scale === nothing ? y[i, j] + β : muladd(y[i, j], entry_at(scale, i, j), β)
            value, derivative = forward(φ, x)
            keeps(φ) && (a[i, j] = x)
            h[i, j] = value
            slope[i, j] = derivative
        end
    end
    return nothing
end

"out ← op(x, y), x (event, batch, k) and y (event, batch)."
by_probe!(op, out, x, y) = (out .= op.(x, y); nothing)

function by_probe!(op, out::Array{T,3}, x::Array{T,3}, y::Matrix{T}) where {T<:BlasReal}
    n = length(y)
    for k in axes(x, 3)
        @inbounds @simd ivdep for i in 1:n
            out[(k - 1) * n + i] = op(x[(k - 1) * n + i], y[i])
        end
    end
    return nothing
end

"ā ← Σ_k φ''(a) r ⊙ ḡ, and then ḡ ← φ'(a) ⊙ ḡ."
function bend!(a_bar, ḡ, φ, a, h, slope, g, r)
    sum!(reshape(a_bar, size(a_bar)..., 1), bend.(Ref(φ), a, h, slope, g, r) .* ḡ)
    ḡ .*= slope
    return nothing
end

function bend!(a_bar::Matrix, ḡ::Array, φ, a::Matrix, h::Matrix, slope::Matrix, g::Array, r::Array)
    for k in axes(ḡ, 3)
        @inbounds for j in axes(a, 2)
            @simd ivdep for i in axes(a, 1)
                s = slope[i, j]
                bent = bend(φ, a[i, j], h[i, j], s, g[i, j, k], r[i, j, k]) * ḡ[i, j, k]
                a_bar[i, j] = k == 1 ? bent : a_bar[i, j] + bent
                ḡ[i, j, k] *= s
            end
        end
    end
    return nothing
end

"x ← x + y ⊙ z."
add_product!(x, y, z) = (x .+= y .* z; nothing)

function add_product!(x::Matrix{T}, y::Matrix{T}, z::Matrix{T}) where {T<:BlasReal}
    @inbounds @simd ivdep for i in eachindex(x, y, z)
        x[i] = muladd(y[i], z[i], x[i])
    end
    return nothing
end
