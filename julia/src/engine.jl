# One solve of the augmented system of one block, and its pullback (pyrnode/engines/pytorch.py).

"""
    Solver(name="RK4"; step_size=0.25, rtol=1e-5, atol=1e-5, error_control=:density, maxiters=10_000,
           sensealg="auto", memory=:auto, together=false, options...)

How a block is integrated. `name` is any of [`algorithms`](@ref). Methods without an error estimate, and those that are
customarily used with a fixed step (Midpoint, Heun, RK4), take `step_size`; the others choose their steps by `rtol` and
`atol`: for each sample of the batch on its own, so that no sample's result depends on the others, or, `together`, for the
whole batch by its hardest sample (faster for small networks; always so on a GPU).

`sensealg` is one of SciMLSensitivity's `InterpolatingAdjoint`, `BacksolveAdjoint`, `QuadratureAdjoint`, `GaussAdjoint`, or
`Backprop`: the exact gradient of the discrete solve, for explicit Runge-Kutta methods. `auto` is `GaussAdjoint` for stiff methods, which
take a Jacobian over the whole state of the adjoint's solve (that of the others has the parameters in it), and else `InterpolatingAdjoint`. With `memory=:checkpoint` only the
states at the steps are kept rather than a dense solution or the stages of fixed steps (or, for `BacksolveAdjoint`, it starts anew from
them). For `Backprop` with fixed steps `:store` keeps every intermediate of the network's evaluations, and `:auto` does while that
is 32 MiB or less. Options that SciML's `solve` knows (`SOLVE_OPTIONS`, such as `adaptive`, `dtmax` or `saveat`) go to it, all others to the algorithm.
`maxiters` bounds the steps that a solver chooses; fixed steps are as many as they are. Throws `ArgumentError`, which names it, for
whatever the solver does not take.
"""
struct Solver
    name::String
    alg::Any
    dense_alg::Any  # the same with an interpolant that adjoints can use
    adaptive::Bool
    step_size::Float64
    rtol::Float64
    atol::Float64
    control_all::Bool
    maxiters::Int
    sensealg::String
    memory::Symbol
    together::Bool
    options::Dict{Symbol,Any}
end

const SENSITIVITIES = ("Backprop", "InterpolatingAdjoint", "BacksolveAdjoint", "QuadratureAdjoint", "GaussAdjoint")

function Solver(
    name="RK4"; step_size=0.25, rtol=1e-5, atol=1e-5, error_control=:density, maxiters=10_000, sensealg="auto", memory=:auto,
    together=false, options...,
)
    step_size > 0 && rtol > 0 && atol > 0 ||
        throw(ArgumentError("step_size = $step_size, rtol = $rtol, atol = $atol: expected positive numbers"))
    error_control in (:density, :all) || throw(ArgumentError("error_control = $(repr(error_control)): expected :density or :all"))
    memory in (:auto, :store, :checkpoint) ||
        throw(ArgumentError("memory = $(repr(memory)): expected :auto, :store or :checkpoint"))
    value(name, :together, together, TRUTH)
    own = is_known(name) ? option_names(name) : String[]
    general = general_options(name, own, options)
    particular = Dict(k => v for (k, v) in options if !is_general(k, own))
    alg = algorithm(name; particular...)
    # The extra stages of a Verner method's interpolant cannot be computed after the solve by an adjoint: 1e-4 is lost.
    lazy = "lazy" in own && !haskey(options, :lazy)
    dense_alg = lazy ? algorithm(name; particular..., lazy=false) : alg
    customary = SciMLBase.isadaptive(alg) && !(nameof(typeof(alg)) in CUSTOMARILY_FIXED)
    adaptive = pop!(general, :adaptive, customary)
    adaptive && memory === :store && throw(ArgumentError(
        "memory = 'store' needs a fixed-step solver, and $name is adaptive; use 'checkpoint' or 'auto'",
    ))
    adaptive && !SciMLBase.isadaptive(alg) && throw(ArgumentError("adaptive = true: $name has no error estimate"))
    sensealg = chosen_sensitivity(name, alg, sensealg, memory)
    return Solver(
        name, alg, dense_alg, adaptive, step_size, rtol, atol, error_control === :all, maxiters, sensealg, memory, together,
        general,
    )
end

"The sensitivity algorithm that is asked for, or by the solver; throws `ArgumentError` where it cannot be with that solver."
function chosen_sensitivity(name, alg, sensealg, memory)
    sensealg == "auto" && return is_implicit(alg) ? "GaussAdjoint" : "InterpolatingAdjoint"
    sensealg in SENSITIVITIES ||
        throw(ArgumentError("unknown sensitivity algorithm $(repr(sensealg)); known: auto, $(join(SENSITIVITIES, ", "))"))
    sensealg == "Backprop" && tableau(alg) === nothing && throw(ArgumentError(
        "Backprop needs an explicit Runge-Kutta method, and $name is none; use one of the adjoints: " *
        join(SENSITIVITIES[2:end], ", "),
    ))
    sensealg == "QuadratureAdjoint" && memory === :checkpoint && throw(ArgumentError(
        "memory = 'checkpoint': QuadratureAdjoint needs the dense solution; use InterpolatingAdjoint or GaussAdjoint, or 'auto'",
    ))
    return sensealg
end

"Bytes of a Jacobian beyond which an implicit method is refused; it holds several, and factorises one in every step."
const JACOBIAN_LIMIT = 128 * 2^20

"Throws `ArgumentError` where an implicit method would need a Jacobian that is too large, with what works in its place."
function check_jacobian(system::Augmented, solver::Solver, u, p, adjoint::Bool)
    is_implicit(solver.alg) || return nothing
    name, n = nameof(typeof(first_of(solver.alg))), length(u)
    too_large(n) = n^2 * sizeof(eltype(u)) > JACOBIAN_LIMIT
    too_large(n) && throw(ArgumentError(
        "$name takes a Jacobian over all $n numbers of the state" * (
            system.shape[2] > 1 && !solver.adaptive ? "; fixed steps go together: take smaller batches, or let it choose its steps" :
            system.shape[2] > 1 ? " of the batch; solve each sample on its own (together = false), or take smaller batches" :
            "; ROCK2 and ROCK4 are for stiff dynamics of many dimensions"
        ),
    ))
    with_parameters = adjoint && solver.sensealg in ("InterpolatingAdjoint", "BacksolveAdjoint")
    with_parameters && too_large(n + length(p)) && throw(ArgumentError(
        "$(solver.sensealg) with $name takes a Jacobian over the adjoint's whole state, which has the $(length(p)) parameters " *
        "in it; use sensealg = 'GaussAdjoint' (which 'auto' is for stiff solvers) or 'QuadratureAdjoint'",
    ))
    return nothing
end

"""
What one solve gives: the state `z` (event..., batch) at the end time, the integrals `l`, `E`, `n`, `D`, `H` (batch), counts, and
SciML's own solution `path` (one for each sample or share where these were solved separately), whose flat states begin with z.
"""
struct Solution{A,V}
    z::A
    l::V
    E::V
    n::V
    D::V
    H::V
    stats::@NamedTuple{nfe::Float64, nfe_max::Int, accepted::Float64, rejected::Float64}
    path::Any
end

"A finished solve of a batch, or of one sample of it, with what its pullback needs."
struct Solve{S,U}
    system::S
    solver::Solver
    tspan::Tuple{Float64,Float64}
    path::U
end

"""
A batch's solves: one for all its columns, or one for each thread's share of them, or one for each sample. `threads` are the
ranges of them that one thread goes through.
"""
struct Solves
    each::Vector{Any}
    columns::Vector{UnitRange{Int}}
    threads::Vector{UnitRange{Int}}
end

separate(solver::Solver, z0) = solver.adaptive && !solver.together && z0 isa Array && size(z0, ndims(z0)) > 1

"Integrates from `z0`; with `record`, keeps what the solver's sensitivity algorithm will ask for."
function solve_forward(
    dynamics, θ, z0, probes, tspan, solver::Solver; context=nothing, total_derivative=false, hjb=false, record=false,
)
    T = eltype(z0)
    T <: AbstractFloat || throw(ArgumentError("the state has element type $T: expected floating point"))
    ε, weight = directions(dynamics, probes, z0)
    check_context(dynamics, context, size(z0, ndims(z0)))
    check_integrals(dynamics, total_derivative, hjb)
    asked, integrals = Asked(probe_count(ε, z0), ε isa UnitVectors, hjb), ε === nothing ? 0 : hjb ? 5 : total_derivative ? 4 : 3
    batch = size(z0, ndims(z0))
    threads = threaded(dynamics) && z0 isa Array ? clamp(batch, 1, Threads.nthreads()) : 1
    columns = separate(solver, z0) ? [i:i for i in 1:batch] : split_range(1:batch, solver.adaptive ? 1 : threads)
    if length(columns) == 1
        system = Augmented(workers(dynamics, θ, z0, batch, asked, threads), context, ε, weight, size(matrix(z0)), integrals)
        found = solve_system(system, flat_parameters(θ, context), matrix(z0), tspan, solver, record, 1)
        return Solves(Any[found], columns, [1:1])
    end
    return solve_apart(dynamics, θ, z0, context, ε, weight, asked, integrals, tspan, solver, record, columns, threads)
end

function check_context(dynamics, context, batch)
    expected = context_length(dynamics) == 0 ? nothing : (context_length(dynamics), batch)
    given = context === nothing ? nothing : size(context)
    given == expected || throw(DimensionMismatch("context of size $given: expected $expected"))
end

function check_integrals(dynamics, total_derivative, hjb)
    kind = nameof(typeof(dynamics))
    total_derivative && !has_total_derivative(dynamics) && throw(ArgumentError("total_derivative = true: $kind has none"))
    hjb && !has_potential(dynamics) && throw(ArgumentError(
        "hjb = true needs dynamics that are the gradient of a potential, such as a PotentialNetwork, and $kind is none",
    ))
    return nothing
end

directions(dynamics, ::Nothing, z0) = (nothing, 0.0)
directions(dynamics, probes::Probes{UnitVectors}, z0) =
    closed_trace(dynamics) ? (probes.ε, probes.weight) : directions(dynamics, Probes(unit_vectors(z0), probes.weight), z0)

function directions(dynamics, probes::Probes, z0)
    size(probes.ε)[1:(end - 1)] == size(z0) ||
        throw(DimensionMismatch("probes of size $(size(probes.ε)): expected $(size(z0)) and their number"))
    return reshape(probes.ε, size(matrix(z0))..., :), probes.weight
end

probe_count(::Nothing, z0) = 0
probe_count(::UnitVectors, z0) = size(matrix(z0), 1)
probe_count(ε, z0) = size(ε, 3)

"One solve for each range of `columns`, the solves shared out to the threads, so that these need not wait for one another."
function solve_apart(dynamics, θ, z0, context, ε, weight, asked, integrals, tspan, solver, record, columns, threads)
    z, found = matrix(z0), Vector{Any}(undef, length(columns))
    shares = split_range(1:length(columns), threads)
    part(x, j) = x === nothing ? nothing : x[:, columns[j]]
    in_threads(length(shares)) do i
        n = length(columns[first(shares[i])])  # as many in all of the share
        own = workers(dynamics, θ, z0, n, asked, 1)
        p = flat_parameters(θ, part(context, first(shares[i])))  # nobody reads the values, so one vector is enough
        for j in shares[i]
            e = ε isa AbstractArray ? ε[:, columns[j], :] : ε
            system = Augmented(own, part(context, j), e, weight, (size(z, 1), n), integrals)
            found[j] = attempt(() -> solve_system(system, p, z[:, columns[j]], tspan, solver, record, length(columns)))
        end
    end
    failed = filter(x -> x isa Exception, found)
    isempty(failed) || throw(together(failed, size(z, 2)))
    return Solves(found, columns, shares)
end

attempt(work) =
    try
        work()
    catch error
        error
    end

"One solve, of `parts` of the batch."
function solve_system(system::Augmented, p, z, tspan, solver::Solver, record::Bool, parts::Int)
    T = eltype(z)
    adjoint = record && solver.sensealg != "Backprop"
    checkpoints = solver.memory === :checkpoint
    dense = adjoint && !checkpoints && solver.sensealg != "BacksolveAdjoint"
    steps = record && (solver.sensealg == "Backprop" || dense || checkpoints)
    system.kept = record ? to_keep(system, solver, z, tspan, parts) : nothing
    # SciMLSensitivity solves again between checkpoints, and passes the tolerances alone: the grid has to be the problem's own.
    grid = solver.adaptive ? (;) : stepping(solver, tspan, T)
    problem = ODEProblem{true}(ode_function(system), initial_state(system, z), T.(tspan), p; grid...)
    check_jacobian(system, solver, problem.u0, p, adjoint)
    given = solver.options
    if record  # what is saved, the pullback reads: it is not for the options to say
        given = filter(option -> !(first(option) in SAVING), given)
        saving = (; save_everystep=steps, dense)
    else
        saving = (; save_everystep=false, dense=false, save_start=false)
    end
    controlled = system.integrals == 0 ? 0 : solver.control_all ? system.integrals : 1
    options = (;
        stepping(solver, tspan, T)..., internalnorm=ErrorNorm(system.shape..., controlled), verbose=false, saving..., given...,
        save_end=true,
    )
    return dynamic(solve_path, problem, adjoint ? solver.dense_alg : solver.alg, options, system, solver, tspan)
end

function solve_path(problem, alg, options, system, solver, tspan)
    path = SciMLBase.solve(problem, alg; options...)
    check(path, system, solver.adaptive)
    return Solve(system, solver, Float64.(tspan), path)
end

"How steps are chosen, in SciML's keywords; `dt` has the sign of the way from `tspan[1]` to `tspan[2]`."
function stepping(solver::Solver, tspan, T)
    solver.adaptive && return (; reltol=T(solver.rtol), abstol=T(solver.atol), maxiters=solver.maxiters)
    return (; adaptive=false, dt=T(copysign(solver.step_size, tspan[2] - tspan[1])), maxiters=typemax(Int))
end

"Writes the state at the end and the integrals (batch, 3 to 5)."
function results!(z, q, solves::Solves)
    foreach((solve, columns) -> dynamic(result!, z, q, solve, columns), solves.each, solves.columns)
    return nothing
end

function result!(z, q, solve::Solve, columns)
    state, integrals = parts(solve.system, last(solve.path.u))
    copyto!(view(z, :, columns), state)
    copyto!(view(q, columns, axes(integrals, 2)), integrals)
    return nothing
end

"Means over the batch (and the largest number of evaluations): nfe, nfe_max, accepted, rejected."
function counts(solves::Solves)
    each = [dynamic(count_of, solve)::NTuple{3,Int} for solve in solves.each]
    nfe, accepted, rejected = (batch_mean(getindex.(each, i), solves) for i in 1:3)
    return (; nfe, nfe_max=maximum(first, each), accepted, rejected)
end

batch_mean(counts, solves) = sum(counts .* length.(solves.columns)) / sum(length, solves.columns)

"Evaluations of the backward pass, the mean over the batch."
backward_count(solves::Solves) = batch_mean(Int[solve.system.nfe_backward for solve in solves.each], solves)

count_of(solve) = (solve.system.nfe, Int(solve.path.stats.naccept), Int(solve.path.stats.nreject))

function Solution(solves::Solves, shape, like)
    z, q = similar(like, prod(shape[1:(end - 1)]), shape[end]), fill!(similar(like, shape[end], 5), false)
    results!(z, q, solves)
    path = length(solves.each) == 1 ? solves.each[1].path : [solve.path for solve in solves.each]
    return Solution(reshape(z, shape), q[:, 1], q[:, 2], q[:, 3], q[:, 4], q[:, 5], counts(solves), path)
end

"""
    integrate(dynamics, θ, z0, probes, tspan, solver; context=nothing, total_derivative=false, hjb=false)

The augmented system of one block from `z0` (event..., batch): a [`Solution`](@ref). `probes` are [`Probes`](@ref), or `nothing`
to solve for the state alone; the end of `tspan` may come first (decoding); `context` (s, batch) is the embedded context of
conditional dynamics, held constant. With `hjb`, of potentials alone, `H` = ∫|∂Φ/∂t − ½‖∇Φ‖²| is integrated too. Differentiable in
`θ` and `z0` by Zygote (through `solver.sensealg`). Throws [`SolveError`](@ref) where SciML's return code is a failure, and
`ArgumentError` where the dynamics lack what is asked for.
"""
function integrate(
    dynamics, θ, z0, probes, tspan, solver::Solver; context=nothing, total_derivative::Bool=false, hjb::Bool=false,
)
    return Solution(solve_forward(dynamics, θ, z0, probes, tspan, solver; context, total_derivative, hjb), size(z0), z0)
end

"""
    pullback(dynamics, θ, z0, probes, tspan, solver; context=nothing, total_derivative=false, hjb=false)

The [`Solution`](@ref), and a function that gives the cotangents of `z0` and `θ` from those of `z` and of the integrals
(batch, 3, 4 with `D`, or 5 with `H`).
"""
function pullback(
    dynamics, θ, z0, probes, tspan, solver::Solver; context=nothing, total_derivative::Bool=false, hjb::Bool=false,
)
    solves = solve_forward(dynamics, θ, z0, probes, tspan, solver; context, total_derivative, hjb, record=true)
    return Solution(solves, size(z0), z0), Pullback(solves, z0, θ)
end

"The function that `pullback` gives; without type parameters, as a closure's would be longer than Julia can store in a package image."
struct Pullback
    solves::Any
    z0::Any
    θ::Any
end

(back::Pullback)(z_bar, q_bar) = dynamic(pull, back.solves, back.z0, back.θ, z_bar, q_bar)

function pull(solves, z0, θ, z_bar, q_bar)
    z0_bar, θ̄ = similar(matrix(z0)), fill!(similar(θ), false)
    solve_backward!(z0_bar, θ̄, nothing, solves, matrix(z_bar), q_bar)
    return reshape(z0_bar, size(z0)), θ̄
end

"Writes the cotangents (event, batch) of the start states, and adds those of θ and of the context (or `nothing`)."
function solve_backward!(z0_bar, θ̄, c̄, solves::Solves, z_bar, q_bar)
    if length(solves.each) == 1
        dynamic(solve_backward!, z0_bar, θ̄, c̄, solves.each[1], z_bar, q_bar)
        return nothing
    end
    shares = [fill!(similar(θ̄), false) for _ in solves.threads]
    in_threads(length(shares)) do i
        for j in solves.threads[i]
            mine = solves.columns[j]
            z0_part, c_part = view(z0_bar, :, mine), columns_of(c̄, mine)
            dynamic(solve_backward!, z0_part, shares[i], c_part, solves.each[j], z_bar[:, mine], q_bar[mine, :])
        end
    end
    foreach(share -> θ̄ .+= share, shares)
    return nothing
end

function solve_backward!(z0_bar, θ̄, c̄, solve::Solve, z_bar, q_bar)
    dynamic(solve.solver.sensealg == "Backprop" ? backprop! : adjoint!, z0_bar, θ̄, c̄, solve, z_bar, q_bar)
    return nothing
end

"SciMLSensitivity's adjoint of one solve."
function adjoint!(z0_bar, θ̄, c̄, solve::Solve, z_bar, q_bar)
    system, solver, path = solve.system, solve.solver, solve.path
    end_bar = similar(last(path.u))
    z̄, q̄ = parts(system, end_bar)
    copyto!(z̄, z_bar)
    copyto!(q̄, view(q_bar, :, axes(q̄, 2)))
    T = eltype(end_bar)
    before = system.nfe
    options = (;
        t=[path.t[end]], dgdu_discrete=(out, u, p, t, i) -> (out .= end_bar), sensealg=sensitivity(solver),
        verbose=false, stepping(solver, reverse(solve.tspan), T)...,
        (solver.adaptive ? (;) : (; abstol=T(solver.atol), reltol=T(solver.rtol)))...,
    )
    u_bar, p_bar = try
        dynamic(adjoint_of_path, path, Watched(solver.alg, system.shape[2]), options)
    finally
        system.product = nothing
    end
    system.nfe_backward += system.nfe - before
    copyto!(z0_bar, parts(system, vec(u_bar))[1])
    θ_part, c_part = split_parameters(vec(p_bar), system.context)
    θ̄ .+= θ_part
    c̄ === nothing || (c̄ .+= c_part)
    return nothing
end

# Called with options of known types: else inference looks into all products that SciMLSensitivity could take (see `dynamic`).
adjoint_of_path(path, alg, options) = SciMLSensitivity.adjoint_sensitivities(path, alg; options...)

"SciMLSensitivity's algorithm. It wants to be told whose products to take where a function has none of its own; ours has."
function sensitivity(solver::Solver)
    vjp, checkpointing = ZygoteVJP(), solver.memory === :checkpoint
    solver.sensealg == "InterpolatingAdjoint" && return InterpolatingAdjoint(; autojacvec=vjp, checkpointing)
    solver.sensealg == "BacksolveAdjoint" && return BacksolveAdjoint(; autojacvec=vjp, checkpointing)
    solver.sensealg == "GaussAdjoint" && return GaussAdjoint(; autojacvec=vjp, checkpointing)
    return QuadratureAdjoint(; autojacvec=vjp, abstol=solver.atol, reltol=solver.rtol)
end

function ChainRulesCore.rrule(::typeof(integrate), dynamics, θ, z0, probes, tspan, solver::Solver; kwargs...)
    solution, back = pullback(dynamics, θ, z0, probes, tspan, solver; kwargs...)
    function integrate_pullback(Δ)
        Δ = unthunk(Δ)
        bar(name, like) = (x = unthunk(getproperty(Δ, name)); x isa ChainRulesCore.AbstractZero || x === nothing ? zero(like) : x)
        q_bar = reduce(hcat, [bar(name, getproperty(solution, name)) for name in (:l, :E, :n, :D, :H)])
        z0_bar, θ̄ = back(bar(:z, solution.z), q_bar)
        return NoTangent(), NoTangent(), θ̄, z0_bar, NoTangent(), NoTangent(), NoTangent()
    end
    return solution, integrate_pullback
end
