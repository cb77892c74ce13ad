# Algorithms by their names, which are looked up and never evaluated, and the tableaus of the explicit Runge-Kutta methods.

"OrdinaryDiffEq's packages, each of which holds a family of algorithms."
const FAMILIES = (
    OrdinaryDiffEqAdamsBashforthMoulton, OrdinaryDiffEqBDF, OrdinaryDiffEqFeagin, OrdinaryDiffEqFIRK, OrdinaryDiffEqHighOrderRK,
    OrdinaryDiffEqLowOrderRK, OrdinaryDiffEqLowStorageRK, OrdinaryDiffEqRosenbrock, OrdinaryDiffEqSDIRK, OrdinaryDiffEqSSPRK,
    OrdinaryDiffEqStabilizedRK, OrdinaryDiffEqTsit5, OrdinaryDiffEqVerner,
)

"Every ODE algorithm of OrdinaryDiffEq's packages, by name."
function algorithms()
    table = Dict{String,Any}()
    for family in FAMILIES, name in names(family)
        isdefined(family, name) || continue
        T = getfield(family, name)
        T isa Type && T <: SciMLBase.AbstractODEAlgorithm && !isabstracttype(T) || continue
        parentmodule(T) === family && (table[String(name)] = T)
    end
    return table
end

"""
    algorithm("Vern7"; lazy=false)

The algorithm of that name with its keyword options. Throws `ArgumentError` for a name or an option that it does not have.
"""
function algorithm(name; options...)
    table = algorithms()
    haskey(table, name) || throw(ArgumentError("unknown solver $(repr(name))$(nearest(name, keys(table)))"))
    T = table[name]
    # Bound dynamics compute with plain numbers in their own memory, so Jacobians are taken by finite differences.
    finite = "autodiff" in keywords(T) && !haskey(options, :autodiff) ? (; autodiff=AutoFiniteDiff()) : (;)
    try
        return Base.inferencebarrier(T)(; finite..., options...)
    catch exception
        exception isa Union{MethodError,ErrorException,ArgumentError,TypeError} || rethrow()
        allowed = isempty(options) ? "" : " ($(join(keys(options), ", "))); its options are $(join(keywords(T), ", "))"
        throw(ArgumentError("$name cannot be made with the options given$allowed"))
    end
end

"Names of an algorithm's keyword options."
keywords(T) = sort!(unique!(String[string(k) for m in methods(T) for k in Base.kwarg_decl(m) if !endswith(string(k), "...")]))

"A hint at names that begin alike, or at where all of them are listed."
function nearest(name, names)
    lowered = lowercase(string(name))
    close = sort!([n for n in names if startswith(lowercase(n), first(lowered, 3))])
    hint = isempty(close) ? "" : " (near: $(join(first(close, 8), ", ")))"
    return "$hint; `pyrnode solvers` and RNODE.algorithms() list the $(length(names)) that there are"
end

"What is known of every algorithm: name, order, kind and package."
function describe_algorithms()
    rows = NamedTuple[]
    for (name, T) in sort!(collect(algorithms()); by=first)
        alg = try
            T()
        catch
            continue  # needs arguments that no name can give
        end
        order = varies(alg) ? 0 : Int(SciMLBase.alg_order(alg))
        push!(rows, (; name, order, kind=kind(alg), package=String(nameof(parentmodule(T)))))
    end
    return rows
end

varies(alg) = occursin(r"VCAB|FBDF|QNDF$|DFBDF|DefaultODE", String(nameof(typeof(alg))))

const IMPLICIT = (OrdinaryDiffEqBDF, OrdinaryDiffEqFIRK, OrdinaryDiffEqRosenbrock, OrdinaryDiffEqSDIRK)
const MULTISTEP = (OrdinaryDiffEqAdamsBashforthMoulton, OrdinaryDiffEqBDF)

"Explicit, stiff (implicit) or stabilised; multistep; adaptive or of fixed step."
function kind(alg)
    family = parentmodule(typeof(alg))
    form = family === OrdinaryDiffEqStabilizedRK ? "stabilised" : family in IMPLICIT ? "stiff" : "explicit"
    fixed = !SciMLBase.isadaptive(alg) || nameof(typeof(alg)) in CUSTOMARILY_FIXED
    return "$form$(family in MULTISTEP ? ", multistep" : ""), $(fixed ? "fixed step" : "adaptive")"
end

"Methods that have an error estimate and are customarily used with a fixed step."
const CUSTOMARILY_FIXED = (:Midpoint, :Heun, :RK4)

"Coefficients of an explicit Runge-Kutta method: row i of `a` weighs the rates before stage i."
struct Tableau
    c::Vector{Float64}
    a::Matrix{Float64}
    b::Vector{Float64}
end

const TABLEAUS = Dict{Any,Union{Nothing,Tableau}}()

"""
    tableau(alg)

The tableau of an explicit Runge-Kutta method, in whatever form the algorithm is written, or `nothing` for other methods.

It is read off one step: the j-th evaluation returns the j-th unit vector, so that the states at which the algorithm
evaluates, and the one at which it arrives, are the rows of its tableau. That the method is one at all is then checked on
a nonlinear problem.
"""
tableau(alg) = get!(() -> dynamic(read_tableau, alg), TABLEAUS, alg)

function read_tableau(alg)
    found = try
        probe_tableau(alg)
    catch
        return nothing
    end
    return all(λ -> reproduces(found, alg, λ), (0.7, 5.0)) ? found : nothing
end

"A system whose j-th evaluation is the j-th unit vector; it remembers where it was evaluated."
mutable struct UnitRates
    const times::Vector{Float64}
    const states::Vector{Vector{Float64}}
    nfe::Int
end

function rate!(du, system::UnitRates, u, t)
    push!(system.times, t)
    push!(system.states, copy(u))
    du .= (1:length(du)) .== length(system.times)
    return du
end

"A nonlinear system that depends on time."
mutable struct Swing
    const λ::Float64
    nfe::Int
end

rate!(du, system::Swing, u, t) = (du .= (sin(system.λ * u[2]) + t, -system.λ * u[1] * cos(t)); du)

"`steps` fixed steps from t0; the problem's type is that of every other solve, for which solvers are compiled already."
function fixed_steps(system, u, t0, dt, steps, alg)
    problem = ODEProblem{true}(ode_function(system), u, (t0, t0 + steps * dt), Float64[])
    return SciMLBase.solve(problem, alg; dt, adaptive=false, dense=false, save_everystep=false, verbose=false)
end

function probe_tableau(alg; room=64)
    system = UnitRates(Float64[], Vector{Float64}[], 0)
    u = last(fixed_steps(system, zeros(room), 0.0, 1.0, 1, alg).u)
    needed, count = u .!= 0, length(system.times)
    for i in count:-1:1  # what feeds a needed stage is needed
        needed[i] && (needed .|= system.states[i] .!= 0)
    end
    stages = findall(needed[1:count])
    return Tableau(system.times[stages], [system.states[i][j] for i in stages, j in stages], u[stages])
end

"Whether five steps by the tableau are five steps of the algorithm (a multistep method is a Runge-Kutta method in its first)."
function reproduces(tableau::Tableau, alg, λ)
    h, t, u = 0.06, 0.2, [0.3, -0.8]
    solution = fixed_steps(Swing(λ, 0), u, t, h, 5, alg)
    SciMLBase.successful_retcode(solution) || return false
    for step in 0:4
        rates = Vector{Float64}[]
        for i in eachindex(tableau.c)
            stage = u + h * sum(tableau.a[i, j] * rates[j] for j in 1:(i - 1); init=zeros(2))
            push!(rates, rate!(zeros(2), Swing(λ, 0), stage, t + (step + tableau.c[i]) * h))
        end
        u += h * sum(tableau.b .* rates)
    end
    found = last(solution.u)
    return max(abs(u[1] - found[1]), abs(u[2] - found[2])) < 1e-12
end
