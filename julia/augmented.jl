# The augmented system of design.md §2 as one flat state [z; l; E; n; D], its pullback, and the norm of its error. The
# blocks of the state are contiguous, so that z is seen as a matrix without a copy, and every solver works on it.

"Bytes of intermediates of one piece of a batch, on a CPU: what a second-level cache takes."
const PIECE = 384 * 2^10

"Bytes of intermediates that are held from an evaluation to its pullback; beyond, pieces share kernels and evaluate again."
const HELD = 64 * 2^20

"One thread's share of a batch: its columns in pieces that go through one after the other, so that they stay in a cache."
struct Worker{K}
    pieces::Vector{UnitRange{Int}}
    kernels::Vector{K}  # of each piece, all on the parameters and the gathered gradient of the first
    holds::Bool         # whether no two pieces share one, so that what an evaluation left is there for a pullback
    last::Vector{Any}   # (f, w, r) of each piece's last evaluation that a pullback may follow
end

Worker(pieces, kernels, holds) = Worker(pieces, kernels, holds, Vector{Any}(undef, length(pieces)))

"Shares the columns of the batch out to the threads, and binds kernels to them."
function workers(dynamics::Dynamics, θ, z0, k)
    batch = size(z0, ndims(z0))
    threads = threaded(dynamics) && z0 isa Array ? min(Threads.nthreads(), batch) : 1
    each = z0 isa Array ? sample_bytes(dynamics, z0, k) : 0
    states(n) = similar(z0, Base.front(size(z0))..., n)
    return map(split_range(1:batch, threads)) do columns
        most = each > 0 ? max(1, PIECE ÷ each) : length(columns)
        pieces = split_range(columns, cld(length(columns), most))
        kernels = [bind(dynamics, θ, states(length(pieces[1])), k)]
        holds = length(columns) * each ≤ HELD
        for piece in pieces[2:end]
            same = holds ? nothing : findfirst(other -> length(other) == length(piece), pieces[1:length(kernels)])
            push!(kernels, same === nothing ? another(kernels[1], states(length(piece))) : kernels[same])
        end
        return Worker(pieces, kernels, holds)
    end
end

"A range in `n` parts that differ by at most one in length."
split_range(range, n) = [range[(length(range) * (i - 1) ÷ n + 1):(length(range) * i ÷ n)] for i in 1:n]

"Runs `work(i)` for i = 1, …, n, each in a thread."
function in_threads(work, n::Int)
    @sync begin
        for i in 2:n
            Threads.@spawn work(i)
        end
        work(1)
    end
    return nothing
end

"The augmented system of one solve: dynamics bound to θ, context and probes held fixed, and counts of what was evaluated."
mutable struct Augmented{K,P,C}
    const workers::Vector{Worker{K}}
    const context::C         # c (s, batch), or `nothing`
    const context_bar::C     # its gathered cotangent
    const probes::P          # ε (event, batch, k), or `nothing`: the state alone
    const weight::Float64
    const shape::Dims{2}     # (event, batch)
    const integrals::Int     # 0 without probes, else 3, or 4 with the total derivative
    nfe::Int
    nfe_backward::Int
    evaluations::Int         # in all, so that a pullback knows whether the last one is still its own
    rates::Any               # what the forward solve evaluated, (t, z, f), where that is kept; see backprop.jl
end

Augmented(workers, context, probes, weight, shape, integrals) = Augmented(
    workers, context, context === nothing ? nothing : fill!(similar(context), false), probes, weight, shape, integrals, 0, 0, 0,
    nothing,
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

"""
Calls `work(worker, number, kernel, columns)` for every piece of the batch, by its number among the worker's. Unless the evaluation
is to be `held`, pieces of one length take one kernel, whose memory is in the cache.
"""
function each_piece(work, system::Augmented; held=false)
    in_threads(length(system.workers)) do i
        worker = system.workers[i]
        for (number, columns) in enumerate(worker.pieces)
            first_one = !held && length(columns) == length(worker.pieces[1])
            work(worker, number, worker.kernels[first_one ? 1 : number], columns)
        end
    end
    system.evaluations += 1
    return nothing
end

columns_of(::Nothing, columns) = nothing
columns_of(x, columns) = view(x, :, columns)

probes_of(system::Augmented, columns) = system.probes === nothing ? nothing : view(system.probes, :, columns, :)

"du = (f, l', E', n', D'); with `tape`, a pullback may follow."
function rate!(du, system::Augmented, u, t; tape=false)
    (z, _), (dz, dq) = parts(system, u), parts(system, du)
    each_piece(system; held=tape) do worker, number, kernel, columns
        ε = probes_of(system, columns)
        f, w, r = found = evaluate!(kernel, t, view(z, :, columns), columns_of(system.context, columns), ε, tape)
        tape && (worker.last[number] = found)
        copyto!(view(dz, :, columns), f)
        ε === nothing || integrands!(view(dq, columns, :), f, w, r, ε, system.weight)
    end
    return du
end

"f alone, into `dz` (event, batch)."
function state_rate!(dz, system::Augmented, z, t)
    each_piece(system) do worker, number, kernel, columns
        f, _, _ = evaluate!(kernel, t, view(z, :, columns), columns_of(system.context, columns), nothing, false)
        copyto!(view(dz, :, columns), f)
    end
    return dz
end

function integrands!(dq, f, w, r, ε, weight)
    c = eltype(f)(weight)
    dq[:, 1] .= c .* vec(sum(ε .* w; dims=(1, 3)))
    dq[:, 2] .= vec(sum(abs2, f; dims=1))
    dq[:, 3] .= c .* vec(sum(abs2, w; dims=(1, 3)))
    size(dq, 2) == 4 && (dq[:, 4] .= vec(sum(abs2, r; dims=1)))
    return nothing
end

function integrands!(dq, f::Matrix{T}, w::Array{T,3}, r, ε, weight) where {T<:AbstractFloat}
    @inbounds for j in axes(f, 2)
        l = E = n = D = zero(T)
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
        if size(dq, 2) == 4
            @simd for i in axes(f, 1)
                D = muladd(r[i, j], r[i, j], D)
            end
            dq[j, 4] = D
        end
    end
    return nothing
end

"""
Cotangent of the state into `ū` (event, batch) and, gathered in the kernels, of θ, from `z_bar` of f and `q_bar`
(batch, integrals; or `nothing`) of the integrands: f̄ = z̄ + 2 Ē f, w̄ = l̄ ε + 2 n̄ w, r̄ = 2 D̄ r. Evaluates at (t, z)
first, piece by piece. `z_bar` is overwritten.
"""
function pull_rate!(ū, system::Augmented, t, z, z_bar, q_bar)
    each_piece(system) do worker, number, kernel, columns
        ε = q_bar === nothing ? nothing : probes_of(system, columns)
        found = evaluate!(kernel, t, view(z, :, columns), columns_of(system.context, columns), ε, true)
        pull_piece!(ū, system, kernel, columns, found, ε, z_bar, q_bar)
    end
    system.nfe_backward += 1
    return ū
end

function pull_piece!(ū, system, kernel, columns, (f, w, r), ε, z_bar, q_bar)
    part, c̄, f̄ = view(ū, :, columns), columns_of(system.context_bar, columns), view(z_bar, :, columns)
    ε === nothing && return pullback!(kernel, part, c̄, f̄, nothing, nothing, 1)
    weight = eltype(f)(system.weight)
    bar(i) = reshape(view(q_bar, columns, i), 1, :)
    f̄ .+= 2 .* bar(2) .* f
    w̄ = weight .* (bar(1) .* ε .+ 2 .* bar(3) .* w)
    return pullback!(kernel, part, c̄, f̄, w̄, r === nothing ? nothing : 2 .* bar(4) .* r, 1)
end

"Adds the gradients of θ and of the context (where there is one) that have gathered, and forgets them."
function gradient!(θ̄, c̄, system::Augmented)
    foreach(worker -> gradient!(θ̄, first(worker.kernels)), system.workers)
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
The right-hand side as SciML's solvers call it, in place or not. Its type says nothing of the dynamics, so that a solver is
compiled once for all of them; one call through `Any` is nothing beside one evaluation.
"""
struct RightHandSide
    system::Any
end

# Not for the numbers of ReverseDiff, which SciMLSensitivity would try if it could (see `dynamic`).
const State = AbstractVector{<:AbstractFloat}

(rhs::RightHandSide)(du, u::State, p, t) = (dynamic(counted_rate!, du, rhs.system, u, t); nothing)
(rhs::RightHandSide)(u::State, p, t) = dynamic(counted_rate!, similar(u), rhs.system, u, t)::typeof(u)

"One vector-Jacobian product of the whole augmented system; all that SciMLSensitivity's adjoints ask of it."
ChainRulesCore.rrule(rhs::RightHandSide, u::State, p, t) = dynamic(product_rule, rhs.system, u, p, t)

function counted_rate!(du, system, u, t)
    system.nfe += 1
    # Low-storage methods hand over something that fuses the assignment with an update.
    rate = rate!(du isa DenseArray ? du : similar(u), system, u, t)
    keep_rate!(system, t, u, rate)
    return rate === du ? du : du .= rate
end

function product_rule(system::Augmented, u, p, t)
    du = rate!(similar(u), system, u, t; tape=true)
    mine, held = system.evaluations, all(worker -> worker.holds, system.workers)
    function product_pullback(ȳ)
        ū, p̄ = fill!(similar(u), false), fill!(similar(p), false)
        z_bar, q_bar = parts(system, copyto!(similar(u), unthunk(ȳ)))
        z̄, z = parts(system, ū)[1], parts(system, u)[1]
        # The kernels still hold what this evaluation left, unless there were others since, or they are shared.
        if held && system.evaluations == mine
            pull_last!(z̄, system, z_bar, q_bar)
        else
            pull_rate!(z̄, system, t, z, z_bar, system.integrals == 0 ? nothing : q_bar)
        end
        gradient!(split_parameters(p̄, system.context)..., system)
        return NoTangent(), ū, p̄, NoTangent()
    end
    return du, product_pullback
end

"`pull_rate!` at the evaluation that the kernels hold."
function pull_last!(ū, system::Augmented, z_bar, q_bar)
    each_piece(system; held=true) do worker, number, kernel, columns
        dynamic(pull_piece!, ū, system, kernel, columns, worker.last[number], probes_of(system, columns), z_bar, q_bar)
    end
    system.nfe_backward += 1
    return ū
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
