# Dynamics of the user's own: any Lux model, by Lux's nested differentiation (pyrnode/dynamics/nested.py).

"""
    LuxDynamics(model, ps, st; event, time=:concat)

Dynamics given by any Lux model; the general path, slower than an explicit product. `ps` and `st` come from `Lux.setup`, and
tell the shape of the flat parameter vector. `event` is the size of one state. With `time = :concat` the model gets one
more row (channel) that holds t, with `:none` the state alone. It must treat the samples of a batch separately.
"""
struct LuxDynamics{M<:AbstractLuxLayer,S,X} <: Dynamics
    model::M
    st::S
    axes::X       # of the parameters in θ
    event::Tuple{Vararg{Int}}
    time::Symbol
end

function LuxDynamics(model::AbstractLuxLayer, ps, st; event, time::Symbol=:concat)
    time in (:none, :concat) || throw(ArgumentError("unknown time entry $(repr(time)); known: :concat, :none"))
    return LuxDynamics(model, LuxCore.testmode(st), getaxes(ComponentArray(ps)), Tuple(event), time)
end

threaded(::LuxDynamics) = false  # Zygote's compilation is not for several threads at once

LuxCore.initialparameters(rng::AbstractRNG, d::LuxDynamics) =
    (; θ=getdata(ComponentArray(LuxCore.initialparameters(rng, d.model))))

"The model with time as one more row of its input; t is part of the state, as it is not differentiated."
struct Timed{M} <: AbstractLuxWrapperLayer{:model}
    model::M
end

function (timed::Timed)(z, ps, st)
    y, inner = timed.model(cat(z, time_row(z, st.t); dims=Val(ndims(z) - 1)), ps, st.model)
    return y, (; model=inner, st.t)
end

"One row (channel) that holds `t` everywhere."
time_row(z, t) = fill!(similar(z, size(z)[1:(end - 2)]..., 1, size(z, ndims(z))), t)
ChainRulesCore.@non_differentiable time_row(::Any, ::Any)

mutable struct BoundModel{D<:LuxDynamics,V}
    const dynamics::D
    const θ::V
    const θ̄::V
    const size::Dims
    back::Any
end

function bind(dynamics::LuxDynamics, θ, z0, ::Asked)
    size(z0)[1:(end - 1)] == dynamics.event ||
        throw(DimensionMismatch("state of size $(size(z0)): expected $(dynamics.event) and the batch"))
    return BoundModel(dynamics, θ, fill!(similar(θ), false), size(z0), nothing)
end

function smodel(bound::BoundModel, θ, t)
    d = bound.dynamics
    ps = ComponentArray(θ, d.axes)
    d.time === :none && return StatefulLuxLayer{true}(d.model, ps, d.st)
    return StatefulLuxLayer{true}(Timed(d.model), ps, (; model=d.st, t=eltype(θ)(t)))
end

function evaluate!(bound::BoundModel, t, z, ::Nothing, ε, tape::Bool)
    directions = ε === nothing ? () : [reshape(copy(view(ε, :, :, i)), bound.size) for i in axes(ε, 3)]
    function products(x, θ)
        model = smodel(bound, θ, t)
        return model(x), map(e -> Lux.vector_jacobian_product(model, AutoZygote(), x, e), directions)
    end
    x = reshape(copy(z), bound.size)
    (f, w), bound.back = tape ? Zygote.pullback(products, x, bound.θ) : (products(x, bound.θ), nothing)
    return ε === nothing ? Evaluation(matrix(f)) : Evaluation(matrix(f); w=cat(map(matrix, w)...; dims=3))
end

function pullback!(bound::BoundModel, z̄, ::Nothing, bars::Cotangents, α)
    each = bars.w === nothing ? () : [reshape(view(bars.w, :, :, i), bound.size) for i in axes(bars.w, 3)]
    x̄, θ̄ = bound.back((reshape(bars.f, bound.size), each))
    θ̄ === nothing || (bound.θ̄ .+= eltype(bound.θ̄)(α) .* getdata(θ̄))
    x̄ === nothing ? fill!(z̄, false) : copyto!(z̄, x̄)
    return z̄
end

function gradient!(θ̄, bound::BoundModel)
    θ̄ .+= bound.θ̄
    fill!(bound.θ̄, false)
    return θ̄
end
