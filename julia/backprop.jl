# Discretise, then optimise: the solve's own accepted steps in reverse (pyrnode/engines/torch.py). At a stage (t_i, z_i) of a
# step of length h, with cotangents z̄ of the new state and q̄ of the integrals,
#
#   f̄ = h (b_i z̄ + Σ_{j>i} a_ji z̄_j) + 2 h b_i Ē f        w̄ = h b_i (l̄ ε + 2 n̄ w)
#
# The steps are those that the solver took, whatever its form: its tableau says what its stages were, from the state at the
# beginning of the step. Where that state is one which the solver evaluated, its rate may have been kept; else it is evaluated again.

"Bytes of them that are kept."
const KEPT = 64 * 2^20

"Keeps a copy of the state and its rate where that is asked for, until there are too many."
keep_rate!(system, t, u, du) = nothing
function keep_rate!(system::Augmented, t, u, du)
    system.rates === nothing && return nothing
    z, f = parts(system, u)[1], parts(system, du)[1]
    if (length(system.rates) + 1) * 2 * length(z) * sizeof(eltype(z)) > KEPT
        system.rates = nothing
    else
        push!(system.rates, (Float64(t), copy(z), copy(f)))
    end
    return nothing
end

"The kept rate at (t, z), but for the rounding of the sums that gave z; `nothing` if there is none."
kept_rate(::Nothing, t, z) = nothing
function kept_rate(rates, t, z)
    near = 64eps(eltype(z))
    for (time, state, rate) in rates
        abs(time - t) ≤ near * max(1, abs(t)) || continue
        mapreduce((a, b) -> abs(a - b), max, state, z) ≤ near * maximum(abs, z) && return rate
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
        known = kept_rate(system.rates, t + method.c[i] * h, stages[i])
        if known === nothing
            state_rate!(rates[i], system, stages[i], t + method.c[i] * h)
            system.nfe_backward += 1
        else
            copyto!(rates[i], known)
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
        probe = q̄ !== nothing && method.b[i] != 0
        pull_rate!(stages[i], system, t + method.c[i] * h, stages[i], f̄, probe ? T(h * method.b[i]) .* q̄ : nothing)
    end
    for i in 1:count
        touched[i] && (z̄ .+= stages[i])
    end
    return nothing
end
