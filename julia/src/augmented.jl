# The augmented system of docs/design.md §2 as one flat state [z; l; E; n; D; H], its pullback, and the norm of its error
# (pyrnode/engines/augmented.py). The blocks of the state are contiguous, so that z is seen as a matrix without a copy, and every
# solver works on it.

"Bytes of intermediates of one piece of a batch, on a CPU: what a second-level cache takes."
const PIECE = 384 * 2^10

"One thread's share of a batch: its columns in pieces, which go through one after the other so that they stay in a cache."
struct Worker{K}
    pieces::Vector{UnitRange{Int}}
    bindings::Dict{Int,K}  # by the length of a piece (there are at most two); they share the gathered gradient
end

"Shares a batch of states like those of `z0` out to the threads, and binds the dynamics for them."
function workers(dynamics::Dynamics, θ, z0, batch, asked::Asked, threads)
    each = z0 isa Array ? sample_bytes(dynamics, z0, asked) : 0
    states(n) = similar(z0, Base.front(size(z0))..., n)
    return map(split_range(1:batch, threads)) do columns
        most = each > 0 ? max(1, PIECE ÷ each) : length(columns)
        pieces = split_range(columns, cld(length(columns), most))
        one = bind(dynamics, θ, states(length(pieces[1])), asked)
        bindings = Dict(length(pieces[1]) => one)
        foreach(piece -> get!(() -> another(one, states(length(piece))), bindings, length(piece)), pieces)
        return Worker(pieces, bindings)
    end
end

"A range in `n` parts that differ by at most one in length."
split_range(range, n) = [range[(length(range) * (i - 1) ÷ n + 1):(length(range) * i ÷ n)] for i in 1:n]

"Runs `work(i)` for i = 1, …, n, each in a thread. When it returns or throws, none of them is running any more."
function in_threads(work, n::Int)
    tasks = [Threads.@spawn work(i) for i in 2:n]
    try
        work(1)
    finally
        foreach(Base._wait, tasks)
    end
    foreach(wait, tasks)  # throws what one of them has thrown
    return nothing
end

"The augmented system of one solve: dynamics bound to θ, context and probes held fixed, and counts of what was evaluated."
mutable struct Augmented{K,P,C}
    const workers::Vector{Worker{K}}
    const context::C         # c (s, batch), or `nothing`
    const context_bar::C     # its gathered cotangent
    const probes::P          # ε (event, batch, k), `UnitVectors` where nobody looks at them, or `nothing`: the state alone
    const weight::Float64
    const shape::Dims{2}     # (event, batch)
    const integrals::Int     # 0 without probes, else 3, 4 with the total derivative, or 5 with the residual
    nfe::Int
    nfe_backward::Int
    product::Any             # the last vector-Jacobian product, or `nothing` (see `product!`)
    kept::Any                # what the forward solve evaluated, or `nothing` (see [`Kept`](@ref))
end

Augmented(workers, context, probes, weight, shape, integrals) = Augmented(
    workers, context, context === nothing ? nothing : fill!(similar(context), false), probes, weight, shape, integrals, 0, 0,
    nothing, nothing,
)

"The state and the integrals (batch, integrals) as views of the flat state."
function parts(system::Augmented, u)
    d, batch = system.shape
    n = d * batch
    return reshape(view(u, 1:n), d, batch), reshape(view(u, (n + 1):(n + batch * system.integrals)), batch, system.integrals)
end

"The flat state at the start: `z0`, and zero integrals."
function initial_state(system::Augmented, z0)
    u = similar(z0, prod(system.shape) + system.shape[2] * system.integrals)
    z, q = parts(system, u)
    copyto!(z, z0)
    fill!(q, false)
    return u
end

"Calls `work(bound, columns)` for every piece of the batch, with the bound dynamics of its thread or, of those given, the piece's own."
function each_piece(work, system::Augmented, bindings=nothing)
    hear()
    in_threads(length(system.workers)) do i
        worker, before = system.workers[i], sum(w -> length(w.pieces), view(system.workers, 1:(i - 1)); init=0)
        for (j, columns) in enumerate(worker.pieces)
            work(bindings === nothing ? worker.bindings[length(columns)] : bindings[before + j], columns)
        end
    end
    return nothing
end

columns_of(::Nothing, columns) = nothing
columns_of(x, columns) = view(x, :, columns)

probes_of(system::Augmented, columns) = probes_of(system.probes, columns)
probes_of(ε, columns) = view(ε, :, columns, :)
probes_of(ε::Union{Nothing,UnitVectors}, columns) = ε

"du = (f, l', E', n', D', H'); by these bound dynamics, if any, whose pullback may follow."
function rate!(du, system::Augmented, u, t, bindings=nothing)
    z, _ = parts(system, u)
    each_piece(system, bindings) do bound, columns
        ε = probes_of(system, columns)
        at = evaluate!(bound, t, view(z, :, columns), columns_of(system.context, columns), ε, bindings !== nothing)
        write_rate!(du, system, columns, at, ε)
    end
    return du
end

write_rate!(::Nothing, system, columns, at, ε) = nothing

function write_rate!(du, system, columns, at, ε)
    dz, dq = parts(system, du)
    copyto!(view(dz, :, columns), at.f)
    ε === nothing || integrands!(view(dq, columns, :), at, ε, system.weight)
    return nothing
end

"f alone, into `dz` (event, batch)."
function state_rate!(dz, system::Augmented, z, t)
    each_piece(system) do bound, columns
        at = evaluate!(bound, t, view(z, :, columns), columns_of(system.context, columns), nothing, false)
        copyto!(view(dz, :, columns), at.f)
    end
    return dz
end

"l', E', n', and D' and H' where the system has them."
function integrands!(dq, at::Evaluation, ε, weight)
    at.w === nothing ? closed!(dq, at) : probed!(dq, at.f, at.w, ε, weight)
    size(dq, 2) ≥ 4 && (dq[:, 4] .= at.r === nothing ? false : vec(sum(abs2, at.r; dims=1)))
    size(dq, 2) == 5 && (dq[:, 5] .= abs.(vec(at.hjb)))
    return nothing
end

function closed!(dq, at)
    dq[:, 1] .= vec(at.trace)
    dq[:, 2] .= vec(sum(abs2, at.f; dims=1))
    dq[:, 3] .= vec(at.norm)
    return nothing
end

function probed!(dq, f, w, ε, weight)
    c = eltype(f)(weight)
    dq[:, 1] .= c .* vec(sum(ε .* w; dims=(1, 3)))
    dq[:, 2] .= vec(sum(abs2, f; dims=1))
    dq[:, 3] .= c .* vec(sum(abs2, w; dims=(1, 3)))
    return nothing
end

function probed!(dq, f::Matrix{T}, w::Array{T,3}, ε, weight) where {T<:AbstractFloat}
    @inbounds for j in axes(f, 2)
        l = E = n = zero(T)
        for k in axes(w, 3)
            @simd for i in axes(w, 1)
                l = muladd(ε[i, j, k], w[i, j, k], l)
                n = muladd(w[i, j, k], w[i, j, k], n)
            end
        end
        @simd for i in axes(f, 1)
            E = muladd(f[i, j], f[i, j], E)
        end
        dq[j, 1], dq[j, 2], dq[j, 3] = T(weight) * l, E, T(weight) * n
    end
    return nothing
end

"""
Cotangent of the state into `ū` (event, batch) and, gathered in the bound dynamics, of θ, from `z_bar` of f and `q_bar`
(batch, integrals; or `nothing`) of the integrands: f̄ = z̄ + 2 Ē f, w̄ = l̄ ε + 2 n̄ w, r̄ = 2 D̄ r, and that of the residual h is
sign(h) H̄. Evaluates at (t, z) first, piece by piece, and writes the rate to `du`, unless that is `nothing`. `z_bar` is overwritten.
"""
function pull_rate!(ū, system::Augmented, t, z, z_bar, q_bar, du=nothing)
    each_piece(system) do bound, columns
        ε = q_bar === nothing ? nothing : probes_of(system, columns)
        at = evaluate!(bound, t, view(z, :, columns), columns_of(system.context, columns), ε, true)
        write_rate!(du, system, columns, at, ε)
        pull_piece!(ū, system, bound, columns, at, ε, z_bar, q_bar)
    end
    system.nfe_backward += 1
    return ū
end

"The same for an evaluation that is kept, by its own bound dynamics."
function pull_kept!(ū, system::Augmented, bindings, z_bar, q_bar)
    each_piece(system, bindings) do bound, columns
        ε = q_bar === nothing ? nothing : probes_of(system, columns)
        at = evaluated!(bound, columns_of(system.context, columns))
        pull_piece!(ū, system, bound, columns, at, ε, z_bar, q_bar)
    end
    return ū
end

function pull_piece!(ū, system, bound, columns, at, ε, z_bar, q_bar)
    part, c̄, f̄ = view(ū, :, columns), columns_of(system.context_bar, columns), view(z_bar, :, columns)
    ε === nothing && return pullback!(bound, part, c̄, Cotangents(f̄), 1)
    bar(i) = reshape(view(q_bar, columns, i), 1, :)
    f̄ .+= 2 .* bar(2) .* at.f
    hjb = at.hjb === nothing ? nothing : sign.(at.hjb) .* bar(5)
    if at.w === nothing
        norm = any(!iszero, bar(3)) ? bar(3) : nothing  # without λ_J it is only looked at, and its pullback is the dearest
        return pullback!(bound, part, c̄, Cotangents(f̄; trace=bar(1), norm, hjb), 1)
    end
    w = eltype(f̄)(system.weight) .* (bar(1) .* ε .+ 2 .* bar(3) .* at.w)
    r = at.r === nothing ? nothing : 2 .* bar(4) .* at.r
    return pullback!(bound, part, c̄, Cotangents(f̄; w, r, hjb), 1)
end

"Adds the gradients of θ and of the context (where there is one) that have gathered, and forgets them."
function gradient!(θ̄, c̄, system::Augmented)
    foreach(worker -> gradient!(θ̄, first(values(worker.bindings))), system.workers)
    system.context === nothing && return nothing
    c̄ .+= system.context_bar
    fill!(system.context_bar, false)
    return nothing
end

"""
The parameters of the system as SciML's adjoints know them, which differentiate by nothing else: θ, and after it the context. The
right-hand side does not read them.
"""
flat_parameters(θ, ::Nothing) = θ
flat_parameters(θ, context) = vcat(θ, vec(context))

"θ's and the context's parts of a vector like `flat_parameters`."
function split_parameters(p, context)
    context === nothing && return p, nothing
    n = length(p) - length(context)
    return view(p, 1:n), reshape(view(p, (n + 1):length(p)), size(context))
end

"""
The right-hand side as SciML's solvers call it. Its type says nothing of the dynamics, so that a solver is compiled once for all
of them; one call through `Any` is nothing beside one evaluation.
"""
struct RightHandSide
    system::Any
end

"λᵀ∂f/∂u; with λᵀ∂f/∂p all that SciMLSensitivity's adjoints ask for beside the right-hand side itself."
struct StateProduct
    system::Any
end

"λᵀ∂f/∂p."
struct ParameterProduct
    system::Any
end

# Not for the numbers of ReverseDiff, which SciMLSensitivity would try if it could (see `dynamic`).
const State = AbstractVector{<:AbstractFloat}

(rhs::RightHandSide)(du, u::State, p, t) = (dynamic(counted_rate!, du, rhs.system, u, t); nothing)
(vjp::StateProduct)(ū, λ, u::State, p, t) = (dynamic(state_product!, ū, vjp.system, λ, u, p, t); nothing)
(vjp::ParameterProduct)(p̄, λ, u::State, p, t) = (dynamic(parameter_product!, p̄, vjp.system, λ, u, p, t); nothing)

"The right-hand side with its products, one type for all systems."
ode_function(system) = ODEFunction{true,SciMLBase.FullSpecialize}(
    RightHandSide(system); vjp=StateProduct(system), vjp_p=ParameterProduct(system),
)

function counted_rate!(du, system, u, t)
    recall!(du, system, u, t) && return du
    system.nfe += 1
    # Low-storage methods hand over something that fuses the assignment with an update.
    rate = rate_and_keep!(du isa DenseArray ? du : similar(u), system, u, t)
    return rate === du ? du : du .= rate
end

state_product!(ū, system, λ, u, p, t) = copyto!(ū, product!(system, λ, u, p, t).ū)
parameter_product!(p̄, system, λ, u, p, t) = copyto!(p̄, product!(system, λ, u, p, t).p̄)

"A vector-Jacobian product of the whole augmented system, where it was taken, and the rate there."
mutable struct Product{U,P}
    const λ::U
    const u::U
    t::Float64
    const ū::U
    const p̄::P
    const du::U
end

Product(u, p) = Product(similar(u), similar(u), NaN, fill!(similar(u), false), similar(p), similar(u))

"""
The product at (λ, u, t). SciMLSensitivity asks for its two parts, and `BacksolveAdjoint` then for the rate, one after the other at
the same place, and one evaluation with its pullback gives them all: so the last one is kept, for as long as an adjoint runs.
"""
function product!(system::Augmented, λ, u, p, t)
    system.product === nothing && (system.product = Product(u, p))
    return dynamic(product!, system.product, system, λ, u, t)
end

function product!(product::Product, system, λ, u, t)
    product.t == t && product.λ == λ && product.u == u && return product
    product.t = NaN  # what is held is not whole until the end
    copyto!(product.λ, λ)
    copyto!(product.u, u)
    z̄, z = parts(system, product.ū)[1], parts(system, product.u)[1]
    z_bar, q_bar = parts(system, copy(product.λ))
    pull_rate!(z̄, system, t, z, z_bar, system.integrals == 0 ? nothing : q_bar, product.du)
    gradient!(split_parameters(fill!(product.p̄, false), system.context)..., system)
    product.t = t
    return product
end

"Writes the rate, if the last product was at (u, t)."
recall!(du, system, u, t) = false
recall!(du, system::Augmented, u, t) = system.product !== nothing && dynamic(recall!, du, system.product, u, t)
function recall!(du, product::Product, u, t)
    product.t == t && product.u == u || return false
    du .= product.du
    return true
end

"""
The norm of a step's error: the root mean square over a sample's state and its first `controlled` integrals, and of these the
largest over the batch, so that a hard sample is not averaged away by easy ones.
"""
struct ErrorNorm
    d::Int
    batch::Int
    controlled::Int
end

(norm::ErrorNorm)(x::Number, t) = abs(x)
Base.broadcastable(norm::ErrorNorm) = Ref(norm)  # multistep methods broadcast over it

function (norm::ErrorNorm)(u::AbstractVector, t)
    d, batch, m = norm.d, norm.batch, norm.controlled
    length(u) < d * batch && return sqrt(sum(abs2, u) / length(u))
    each = sum(abs2, reshape(view(u, 1:(d * batch)), d, batch); dims=1)
    q = sum(abs2, reshape(view(u, (d * batch + 1):(d * batch + m * batch)), batch, m); dims=2)
    return sqrt(maximum(each .+ reshape(q, 1, batch)) / (d + m))
end

function (norm::ErrorNorm)(u::Vector{T}, t) where {T<:AbstractFloat}
    d, batch, m = norm.d, norm.batch, norm.controlled
    length(u) < d * batch && return sqrt(sum(abs2, u) / length(u))
    largest = zero(T)
    @inbounds for j in 1:batch
        total = zero(T)
        for i in ((j - 1) * d + 1):(j * d)
            total += u[i]^2
        end
        for i in 1:m
            total += u[d * batch + (i - 1) * batch + j]^2
        end
        largest = ifelse(total > largest || isnan(total), total, largest)
    end
    return sqrt(largest / (d + m))
end
