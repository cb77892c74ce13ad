# The layers of the dynamics, a = s(t) ⊙ (W h) + β(t), and their transposes (pyrnode/dynamics/layers.py).
#
# A layer is a linear map and the way in which time enters it. Both are bound to views of the flat parameter vector θ and
# of its gradient θ̄ for the length of one solve. Scale and shift are vectors over a whole event (every pixel of every
# channel), so that all elementwise work is on matrices (event, batch).

"What a layer is made of; `offset` is where its parameters begin in θ, in the order weight, bias, time."
struct LayerSpec
    inputs::Int
    outputs::Int
    kernel_size::Int         # side of the convolution; 0 for a dense layer
    size::Tuple{Int,Int}     # (W, H) of the images; (1, 1) for a dense layer
    time::Symbol             # :none, :concat or :concatsquash
    offset::Int
end

taps(spec::LayerSpec) = max(spec.kernel_size, 1)^2
pixels(spec::LayerSpec) = prod(spec.size)

"Names and lengths of a layer's parameters, in order."
function parameter_lengths(spec::LayerSpec)
    lengths = [:weight => taps(spec) * spec.inputs * spec.outputs, :bias => spec.outputs]
    spec.time === :concat && push!(lengths, :time_weight => taps(spec) * spec.outputs)
    spec.time === :concatsquash && append!(lengths, [n => spec.outputs for n in (:gate_weight, :gate_bias, :time_shift)])
    return lengths
end

Base.length(spec::LayerSpec) = sum(last, parameter_lengths(spec))

"A layer's parameters, or their gradients: views of a flat vector, empty where the layer has none of that name."
struct Slices{V}
    weight::V
    bias::V
    time_weight::V
    gate_weight::V
    gate_bias::V
    time_shift::V
end

function Slices(spec::LayerSpec, θ)
    ranges = Dict{Symbol,UnitRange{Int}}()
    start = spec.offset
    for (name, n) in parameter_lengths(spec)
        ranges[name] = (start + 1):(start + n)
        start += n
    end
    part(name) = piece(θ, get(ranges, name, 1:0))
    return Slices(
        part(:weight), part(:bias), part(:time_weight), part(:gate_weight), part(:gate_bias), part(:time_shift),
    )
end

"A contiguous part of a flat vector, on the same memory; who holds it holds the vector too."
piece(θ, range) = view(θ, range)
# As an array of its own rather than a view: BLAS and the compiler know it better.
piece(θ::Vector, range) = isempty(range) ? similar(θ, 0) : unsafe_wrap(Array, pointer(θ, first(range)), length(range))

# --- linear maps ---

"(in, batch) to (out, batch); torch's weight (out, in) is (in, out) here."
struct Dense{W}
    weight::W
    gradient::W
end

linear(::Val{0}, spec::LayerSpec, w, w̄) = dense(reshape(w, spec.inputs, spec.outputs), reshape(w̄, spec.inputs, spec.outputs))

dense(weight, gradient) = Dense(weight, gradient)
dense(weight::Matrix{T}, gradient::Matrix{T}) where {T<:BlasReal} =
    is_small(T, size(weight)...) ? SmallDense(weight, gradient) : Dense(weight, gradient)

apply!(y, l::Dense, h) = mul!(y, transpose(l.weight), h)
transpose!(x, l::Dense, g) = mul!(x, l.weight, g)
accumulate!(l::Dense, h, g, α) = mul!(l.gradient, h, transpose(g), α, true)

# BLAS itself, without the choices that `mul!` makes first.
const BlasDense = Dense{Matrix{T}} where {T<:BlasReal}
apply!(y::Matrix{T}, l::BlasDense{T}, h::Matrix{T}) where {T} = BLAS.gemm!('T', 'N', one(T), l.weight, h, zero(T), y)
transpose!(x::Matrix{T}, l::BlasDense{T}, g::Matrix{T}) where {T} = BLAS.gemm!('N', 'N', one(T), l.weight, g, zero(T), x)
accumulate!(l::BlasDense{T}, h::Matrix{T}, g::Matrix{T}, α) where {T} =
    BLAS.gemm!('N', 'T', T(α), h, g, one(T), l.gradient)

"(W, H, in, batch) to (W, H, out, batch): cross-correlation with zero padding; torch's weight (out, in, kh, kw) reversed."
struct Conv{W,R}
    weight::W
    gradient::W
    turned::R
end

function linear(::Val{2}, spec::LayerSpec, w, w̄)
    shape = (spec.kernel_size, spec.kernel_size, spec.inputs, spec.outputs)
    return convolution(reshape(w, shape), reshape(w̄, shape), spec.size)
end

convolution(weight, gradient, size) = Conv(weight, gradient, turn(weight))
convolution(weight::Array{T,4}, gradient::Array{T,4}, size) where {T<:BlasReal} = DirectConv(weight, gradient, size)

"The weight of the transpose as a convolution: flipped, and channels exchanged."
turn(weight) = permutedims(weight[end:-1:1, end:-1:1, :, :], (1, 2, 4, 3))  # `reverse` is not for every GPU's arrays

cdims(h, w) = DenseConvDims(h, w; padding=size(w, 1) ÷ 2, flipkernel=true)

apply!(y, l::Conv, h) = NNlib.conv!(y, h, l.weight, cdims(h, l.weight))
transpose!(x, l::Conv, g) = NNlib.conv!(x, g, l.turned, cdims(g, l.turned))
function accumulate!(l::Conv, h, g, α)
    T = eltype(g)
    return NNlib.∇conv_filter!(l.gradient, h, g, cdims(h, l.weight); alpha=T(α), beta=one(T))
end

# --- how time enters ---

"Sums (event, batch) or (event,) over the pixels of each channel: (channels, batch) or (channels,)."
gather(spec::LayerSpec, x::AbstractVector) = vec(sum(reshape(x, pixels(spec), spec.outputs); dims=1))
gather(spec::LayerSpec, x::AbstractMatrix) =
    pixels(spec) == 1 ? x : reshape(sum(reshape(x, pixels(spec), :); dims=1), spec.outputs, size(x, 2))

batch_sum(x) = vec(sum(x; dims=2))

function batch_sum(x::Matrix)
    total, rest = zeros(eltype(x), size(x, 1)), size(x, 2) % 4
    @inbounds for j in 1:rest
        @simd for i in axes(x, 1)
            total[i] += x[i, j]
        end
    end
    @inbounds for j in (rest + 1):4:size(x, 2)
        @simd for i in axes(x, 1)
            total[i] += (x[i, j] + x[i, j + 1]) + (x[i, j + 2] + x[i, j + 3])
        end
    end
    return total
end

"Repeats a value for each channel over its pixels."
spread(spec::LayerSpec, x) = pixels(spec) == 1 ? x : vec(reshape(x, 1, :) .* fill!(similar(x, pixels(spec)), true))

"The response (event,) to an input channel that is 1 everywhere, of a weight (taps × out)."
function constant(spec::LayerSpec, w)
    spec.kernel_size == 0 && return w
    weight = reshape(w, spec.kernel_size, spec.kernel_size, 1, spec.outputs)
    ones = fill!(similar(w, spec.size..., 1, 1), true)
    return vec(NNlib.conv!(similar(w, spec.size..., spec.outputs, 1), ones, weight, cdims(ones, weight)))
end

"Transpose of `constant`: adds the gradient of the weight, from a cotangent (event,)."
function constant_gradient!(w̄, spec::LayerSpec, x̄)
    spec.kernel_size == 0 && return w̄ .+= x̄
    weight = reshape(w̄, spec.kernel_size, spec.kernel_size, 1, spec.outputs)
    ones = fill!(similar(w̄, spec.size..., 1, 1), true)
    NNlib.∇conv_filter!(weight, ones, reshape(x̄, spec.size..., spec.outputs, 1), cdims(ones, weight); beta=one(eltype(w̄)))
    return w̄
end

abstract type TimeEntry end

"a = W h + b."
struct NoTime{V} <: TimeEntry
    shift::V
    shift_bar::V
end

"Time is one more input channel: a = W h + (b + t m), where m is the response to a channel of ones."
struct ConcatTime{V} <: TimeEntry
    bias::V
    response::V
    shift::V      # b + t m, at the present time
    shift_bar::V
    time_bar::V
end

"A gate and a shift by time: a = (W h + b) σ(t u + c) + t v (FFJORD's concatsquash)."
struct ConcatSquashTime{P,V} <: TimeEntry
    parameters::P
    bars::P
    scale::V
    shift::V
end

event(spec, p) = fill!(similar(p.bias, pixels(spec) * spec.outputs), false)
own_bias(spec, p) = copyto!(event(spec, p), spread(spec, p.bias))

"The layer's way of time, bound to its parameters `p` and their gradients `p̄`."
time_entry(::Val{:none}, spec::LayerSpec, p, p̄) = NoTime(own_bias(spec, p), event(spec, p))

function time_entry(::Val{:concat}, spec::LayerSpec, p, p̄)
    response = copyto!(event(spec, p), constant(spec, p.time_weight))
    return ConcatTime(own_bias(spec, p), response, event(spec, p), event(spec, p), event(spec, p))
end

time_entry(::Val{:concatsquash}, spec::LayerSpec, p, p̄) = ConcatSquashTime(p, p̄, event(spec, p), event(spec, p))

"Brings scale and shift to time `t`; gives the shift."
at!(entry::NoTime, spec, t) = entry.shift

"The scale at the time of the last `at!`; `nothing` where it is 1."
scale(::TimeEntry) = nothing

function at!(entry::ConcatTime, spec, t)
    @. entry.shift = entry.bias + t * entry.response
    return entry.shift
end

gate(p, t) = sigmoid.(t .* p.gate_weight .+ p.gate_bias)

function at!(entry::ConcatSquashTime, spec, t)
    p = entry.parameters
    s = gate(p, t)
    entry.scale .= spread(spec, s)
    entry.shift .= spread(spec, p.bias .* s .+ t .* p.time_shift)
    return entry.shift
end

scale(entry::ConcatSquashTime) = entry.scale

"Adds the gradient from the sums over the batch of the cotangents of the layer's output and of its scale, both (event,)."
accumulate!(entry::NoTime, spec, t, a_bar, s_bar, α) = (entry.shift_bar .+= α .* a_bar; nothing)

function accumulate!(entry::ConcatTime, spec, t, a_bar, s_bar, α)
    @. entry.shift_bar += α * a_bar
    @. entry.time_bar += (α * t) * a_bar
    return nothing
end

function accumulate!(entry::ConcatSquashTime, spec, t, a_bar, s_bar, α)
    p, p̄ = entry.parameters, entry.bars
    s, b̄ = gate(p, t), gather(spec, a_bar)
    s̄ = (gather(spec, s_bar) .+ p.bias .* b̄) .* s .* (1 .- s)
    p̄.bias .+= α .* s .* b̄
    p̄.time_shift .+= (α * t) .* b̄
    p̄.gate_weight .+= (α * t) .* s̄
    p̄.gate_bias .+= α .* s̄
    return nothing
end

"Adds what gathered over the solve to the gradients `p̄`."
finish!(entry::NoTime, spec, p̄) = (p̄.bias .+= gather(spec, entry.shift_bar); fill!(entry.shift_bar, false); nothing)

function finish!(entry::ConcatTime, spec, p̄)
    p̄.bias .+= gather(spec, entry.shift_bar)
    constant_gradient!(p̄.time_weight, spec, entry.time_bar)
    fill!(entry.shift_bar, false)
    fill!(entry.time_bar, false)
    return nothing
end

finish!(::ConcatSquashTime, spec, p̄) = nothing

# --- how a context enters ---

"""
Time and the embedded context of each sample: `c` is added to the shift, and with `ConcatSquashTime` its second half to what the
gate is made of. Scale and shift are matrices (event, batch) then.
"""
struct ContextEntry{E<:TimeEntry,S,M} <: TimeEntry
    entry::E
    scale::S   # `nothing` where it is 1
    shift::M
end

"Vectors (out,) that a layer's embedded context is made of."
context_parts(time) = time === :concatsquash ? 2 : 1

with_context(entry::TimeEntry, shift) = ContextEntry(entry, nothing, shift)
with_context(entry::ConcatSquashTime, shift) = ContextEntry(entry, similar(shift), shift)

"(event, batch) by pixels, channels and samples."
by_channel(spec, x) = reshape(x, pixels(spec), spec.outputs, :)

at!(entry::TimeEntry, spec, t, ::Nothing) = at!(entry, spec, t)

function at!(entry::ContextEntry, spec, t, c)
    shift = at!(entry.entry, spec, t)
    by_channel(spec, entry.shift) .= by_channel(spec, shift) .+ reshape(c, 1, spec.outputs, :)
    return entry.shift
end

function at!(entry::ContextEntry{<:ConcatSquashTime}, spec, t, c)
    p, n = entry.entry.parameters, spec.outputs
    s = sigmoid.(t .* p.gate_weight .+ p.gate_bias .+ view(c, (n + 1):(2n), :))
    by_channel(spec, entry.scale) .= reshape(s, 1, n, :)
    by_channel(spec, entry.shift) .= reshape(p.bias .* s .+ t .* p.time_shift .+ view(c, 1:n, :), 1, n, :)
    return entry.shift
end

scale(entry::ContextEntry) = entry.scale

"""
Adds the gradient from the cotangents (event, batch) of a layer's output and of its scale (or `nothing`), and α times that of the
embedded context to `c̄`, where there is one.
"""
accumulate!(entry::TimeEntry, spec, t, a_bar::AbstractMatrix, s_bar, α, ::Nothing) =
    accumulate!(entry, spec, t, batch_sum(a_bar), s_bar === nothing ? nothing : batch_sum(s_bar), α)

function accumulate!(entry::ContextEntry, spec, t, a_bar::AbstractMatrix, s_bar, α, c̄)
    c̄ .+= α .* gather(spec, a_bar)
    return accumulate!(entry.entry, spec, t, batch_sum(a_bar), nothing, α)
end

function accumulate!(entry::ContextEntry{<:ConcatSquashTime}, spec, t, a_bar::AbstractMatrix, s_bar, α, c̄)
    p, p̄, n = entry.entry.parameters, entry.entry.bars, spec.outputs
    s, b̄ = by_channel(spec, entry.scale)[1, :, :], gather(spec, a_bar)
    s̄ = (gather(spec, s_bar) .+ p.bias .* b̄) .* s .* (1 .- s)
    view(c̄, 1:n, :) .+= α .* b̄
    view(c̄, (n + 1):(2n), :) .+= α .* s̄
    p̄.bias .+= α .* batch_sum(s .* b̄)
    p̄.time_shift .+= (α * t) .* batch_sum(b̄)
    p̄.gate_weight .+= (α * t) .* batch_sum(s̄)
    p̄.gate_bias .+= α .* batch_sum(s̄)
    return nothing
end

finish!(entry::ContextEntry, spec, p̄) = finish!(entry.entry, spec, p̄)
