# Discretise, then optimise: the solve's own accepted steps in reverse (pyrnode/engines/backprop.py). At a stage (t_i, z_i) of a
# step of length h, with cotangents z̄ of the new state and q̄ of the integrals,
#
#   f̄ = h (b_i z̄ + Σ_{j>i} a_ji z̄_j) + 2 h b_i Ē f        w̄ = h b_i (l̄ ε + 2 n̄ w)
#
# The steps are those that the solver took, whatever its form: its tableau says what its stages were, from the state at the
# beginning of the step. Where that state is one which the solver evaluated, its rate may have been kept, and even all that its
# pullback needs; else it is evaluated again.

"Bytes of states and rates that are kept, and of evaluations (as in PyTorch's `memory = \"auto\"`)."
const KEPT = 64 * 2^20
const KEPT_EVALUATIONS = 32 * 2^20

"""
An evaluation of the forward solve: f at (t, z), and for each piece of the batch the bound dynamics that have what a
pullback needs, or none at all.
"""
struct Linearization{A,K}
    t::Float64
    z::A
    f::A
    bindings::Vector{K}
    memory::Memory  # of their tapes
end

"The evaluations of a forward solve: up to `most` bytes of their states and rates, and bound dynamics with tapes of so many bytes, if any."
struct Kept{E<:Linearization}
    evaluations::Vector{E}
    most::Int
    tape_bytes::Int
end

"What a solve with fixed steps is to keep, if it is one of `parts` of a batch; `nothing`: that it is evaluated again."
function to_keep(system::Augmented, solver::Solver, z, tspan, parts)
    solver.sensealg == "Backprop" && !solver.adaptive && solver.memory !== :checkpoint || return nothing
    bytes = sum(worker -> sum(piece -> kept_bytes(worker.bindings[length(piece)]), worker.pieces), system.workers)
    solver.memory === :store && bytes == 0 && throw(ArgumentError(
        "memory = 'store' needs dynamics with an explicit product; use 'checkpoint' or 'auto'",
    ))
    count = cld(abs(tspan[2] - tspan[1]), solver.step_size) * length(tableau(solver.alg).c)
    whole = solver.memory === :store || 0 < bytes * count ≤ KEPT_EVALUATIONS ÷ parts
    most = solver.memory === :store ? typemax(Int) : KEPT ÷ parts
    return Kept(evaluations_of(system, z), most, whole ? bytes : 0)
end

evaluations_of(::Augmented{K}, z) where {K} = Linearization{typeof(similar(z)),K}[]

"The rate, kept where that is asked for, until it is too much."
rate_and_keep!(du, system, u, t) = rate!(du, system, u, t)
rate_and_keep!(du, system::Augmented, u, t) =
    system.kept === nothing ? rate!(du, system, u, t) : dynamic(rate_and_keep!, du, system, system.kept, u, t)

function rate_and_keep!(du, system::Augmented, kept::Kept{Linearization{A,K}}, u, t) where {A,K}
    z, f = parts(system, u)[1], parts(system, du)[1]
    if (length(kept.evaluations) + 1) * 2 * length(z) * sizeof(eltype(z)) > kept.most
        system.kept = nothing
        return rate!(du, system, u, t)
    end
    whole = kept.tape_bytes > 0
    memory = Memory(whole && A <: Array ? borrow(kept.tape_bytes) : UInt8[], 0)
    bindings = K[]
    whole && for worker in system.workers, piece in worker.pieces
        push!(bindings, keeping(worker.bindings[length(piece)], memory))
    end
    evaluation = Linearization{A,K}(t, copy(z), similar(z), bindings, memory)
    push!(kept.evaluations, evaluation)  # which holds the memory while it is written
    rate!(du, system, u, t, whole ? bindings : nothing)
    copyto!(evaluation.f, f)
    return du
end

"The kept evaluation at (t, z), but for the rounding of the sums that gave z; `nothing` if there is none."
kept_evaluation(::Nothing, t, z) = nothing
function kept_evaluation(kept::Kept, t, z)
    near = 64eps(eltype(z))
    for evaluation in kept.evaluations
        abs(evaluation.t - t) ≤ near * max(1, abs(t)) || continue
        mapreduce((a, b) -> abs(a - b), max, evaluation.z, z) ≤ near * maximum(abs, z) && return evaluation
    end
    return nothing
end

"Gives the tapes' memory back; a second pullback of the same solve evaluates again."
forget_bindings!(::Nothing) = nothing
function forget_bindings!(kept::Kept)
    for evaluation in Iterators.reverse(kept.evaluations)  # the first is the last that was used
        isempty(evaluation.bindings) && continue
        empty!(evaluation.bindings)
        isempty(evaluation.memory.block) || give_back!(evaluation.memory.block)
    end
    return nothing
end

function backprop!(z0_bar, θ̄, c̄, solve::Solve, z_bar, q_bar)
    system, path = solve.system, solve.path
    method = tableau(solve.solver.alg)
    stages = [similar(z_bar) for _ in method.c]  # z_i, and then z̄_i
    rates = [similar(z_bar) for _ in method.c]
    z̄ = copy(z_bar)
    f̄, q̄ = similar(z̄), system.integrals == 0 ? nothing : view(q_bar, :, 1:(system.integrals))
    for step in (length(path.t) - 1):-1:1
        t, h = Float64(path.t[step]), Float64(path.t[step + 1]) - Float64(path.t[step])
        z, _ = parts(system, path.u[step])
        replay!(stages, rates, system, method, z, t, h)
        step_back!(z̄, stages, f̄, system, method, t, h, q̄)
    end
    copyto!(z0_bar, z̄)
    gradient!(θ̄, c̄, system)
    forget_bindings!(system.kept)
    return nothing
end

"The states of a step's stages, from the state at its beginning."
function replay!(stages, rates, system::Augmented, method::Tableau, z, t, h)
    T, last_needed = eltype(z), length(method.c)
    for i in eachindex(stages)
        copyto!(stages[i], z)
        for j in 1:(i - 1)
            method.a[i, j] == 0 || (stages[i] .+= T(h * method.a[i, j]) .* rates[j])
        end
        i == last_needed && break
        known = kept_evaluation(system.kept, t + method.c[i] * h, stages[i])
        if known === nothing
            state_rate!(rates[i], system, stages[i], t + method.c[i] * h)
            system.nfe_backward += 1
        else
            copyto!(rates[i], known.f)
        end
    end
    return nothing
end

"Pulls z̄ back through one step; the stages' states give way to their cotangents."
function step_back!(z̄, stages, f̄, system::Augmented, method::Tableau, t, h, q̄)
    T, count = eltype(z̄), length(method.c)
    touched = falses(count)
    for i in count:-1:1
        f̄ .= T(h * method.b[i]) .* z̄
        used = method.b[i] != 0
        for j in (i + 1):count
            touched[j] && method.a[j, i] != 0 || continue
            f̄ .+= T(h * method.a[j, i]) .* stages[j]
            used = true
        end
        touched[i] = used || continue
        q_bar = q̄ !== nothing && method.b[i] != 0 ? T(h * method.b[i]) .* q̄ : nothing
        known = kept_evaluation(system.kept, t + method.c[i] * h, stages[i])
        if known === nothing || isempty(known.bindings)
            pull_rate!(stages[i], system, t + method.c[i] * h, stages[i], f̄, q_bar)
        else
            pull_kept!(stages[i], system, known.bindings, f̄, q_bar)
        end
    end
    for i in 1:count
        touched[i] && (z̄ .+= stages[i])
    end
    return nothing
end
