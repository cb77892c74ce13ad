# Algorithms by their names, which are looked up and never evaluated, and the tableaus of the explicit Runge-Kutta methods.

"OrdinaryDiffEq's packages, each of which holds a family of algorithms."
const FAMILIES = (
    OrdinaryDiffEqAdamsBashforthMoulton, OrdinaryDiffEqBDF, OrdinaryDiffEqFeagin, OrdinaryDiffEqFIRK, OrdinaryDiffEqHighOrderRK,
    OrdinaryDiffEqLowOrderRK, OrdinaryDiffEqLowStorageRK, OrdinaryDiffEqRosenbrock, OrdinaryDiffEqSDIRK, OrdinaryDiffEqSSPRK,
    OrdinaryDiffEqStabilizedRK, OrdinaryDiffEqTsit5, OrdinaryDiffEqVerner,
)

"Names of OrdinaryDiffEq's for an algorithm with other coefficients: functions, with the options of that algorithm."
const VARIANTS = (; QBDF=OrdinaryDiffEqBDF.QNDF, QBDF1=OrdinaryDiffEqBDF.QNDF1, QBDF2=OrdinaryDiffEqBDF.QNDF2)

"What makes every ODE algorithm of OrdinaryDiffEq's packages, by name; beside them there are `COMPOSITES`."
function algorithms()
    table = Dict{String,Any}(String(name) => getfield(OrdinaryDiffEqBDF, name) for name in keys(VARIANTS))
    for family in FAMILIES, name in names(family)
        isdefined(family, name) || continue
        T = getfield(family, name)
        T isa Type && T <: SciMLBase.AbstractODEAlgorithm && !isabstracttype(T) || continue
        parentmodule(T) === family && (table[String(name)] = T)
    end
    return table
end

"Explicit methods that hand over to a stiff one where the dynamics are, named in brackets: `AutoTsit5(Rosenbrock23)`."
const COMPOSITES = (;
    OrdinaryDiffEqLowOrderRK.AutoDP5, OrdinaryDiffEqTsit5.AutoTsit5, OrdinaryDiffEqVerner.AutoVern6, OrdinaryDiffEqVerner.AutoVern7,
    OrdinaryDiffEqVerner.AutoVern8, OrdinaryDiffEqVerner.AutoVern9,
)

"The two names in that of a composite, or `nothing`."
function composite_names(name)
    found = match(r"^(Auto\w+)\((\w+)(\(\))?\)$", name)
    return found !== nothing && haskey(COMPOSITES, Symbol(found[1])) ? (Symbol(found[1]), String(found[2])) : nothing
end

"Whether there is an algorithm of that name."
function is_known(name)
    both, table = composite_names(name), algorithms()
    return haskey(table, name) || (both !== nothing && haskey(table, both[2]))
end

"""
    algorithm("Vern7"; lazy=false)

The algorithm of that name with its keyword options. Throws `ArgumentError` for a name or an option that it does not have.
"""
function algorithm(name; options...)
    both, table = composite_names(name), algorithms()
    is_known(name) || throw(ArgumentError("unknown solver $(repr(name))$(nearest(name, keys(table)))"))
    if both === nothing
        make = table[name]
    else
        stiff = algorithm(both[2])
        make = (; given...) -> COMPOSITES[both[1]](stiff; given...)
    end
    # Bound dynamics compute with plain numbers in their own memory, so Jacobians are taken by finite differences.
    names = option_names(name)
    finite = "autodiff" in names && !haskey(options, :autodiff) ? (; autodiff=AutoFiniteDiff()) : (;)
    given = particular_options(name, names, options, bare(make))
    try
        return Base.inferencebarrier(make)(; finite..., given...)
    catch exception
        exception isa Union{MethodError,ErrorException,ArgumentError,TypeError,UndefKeywordError} || rethrow()
        why = exception isa UndefKeywordError ? "it needs the option $(exception.var)" : "its options are $(join(names, ", "))"
        throw(ArgumentError("$name cannot be made$(isempty(options) ? "" : " with the options given ($(join(keys(options), ", ")))"); $why"))
    end
end

"An algorithm with no options, or `nothing` where it needs some."
bare(make) =
    try
        Base.inferencebarrier(make)()
    catch
        nothing
    end

"Names of an algorithm's keyword options."
function option_names(name)
    both = composite_names(name)
    both === nothing && return keywords(get(VARIANTS, Symbol(name), algorithms()[name]))
    return sort!([SWITCHING; filter(==("lazy"), keywords(COMPOSITES[both[1]]))])
end

"Options of `AutoSwitch`, which composites are made with."
const SWITCHING = ["dtfac", "maxnonstiffstep", "maxstiffstep", "nonstifftol", "stiffalgfirst", "stifftol", "switch_max"]

keywords(T) = sort!(unique!(String[string(k) for m in methods(T) for k in Base.kwarg_decl(m) if !endswith(string(k), "...")]))

"A hint at names that begin alike, or at where all of them are listed."
function nearest(name, names)
    lowered = lowercase(string(name))
    close = sort!([n for n in names if startswith(lowercase(n), first(lowered, 3))])
    hint = isempty(close) ? "" : " (near: $(join(first(close, 8), ", ")))"
    return "$hint; `pyrnode solvers` and RNODE.algorithms() list the $(length(names)) that there are"
end

"What is known of every algorithm that its name alone makes: name, order, kind, package, and what is wrong with it."
function describe_algorithms()
    names = [collect(keys(algorithms())); ["$name(Rosenbrock23)" for name in keys(COMPOSITES)]]
    rows = NamedTuple[]
    for name in sort!(names)
        alg = try
            algorithm(name)
        catch
            continue  # needs options
        end
        order = varies(alg) ? 0 : Int(SciMLBase.alg_order(alg))
        package = String(nameof(parentmodule(typeof(first_of(alg)))))
        push!(rows, (; name, order, kind=kind(alg), package, fault=get(FAULTS, name, "")))
    end
    return rows
end

"A composite's explicit method, or the method itself."
first_of(alg) = hasproperty(alg, :algs) ? first(alg.algs) : alg

"What is known to be wrong of methods, found by tests/julia/solvers.jl (docs/solvers.md)."
const FAULTS = Dict(
    "AdaptiveRadau" => "becomes unstable where it raises its order, in OrdinaryDiffEq itself; right with max_order = 5",
    "Alshina2" => "does not arrive by steps of its own choice, in OrdinaryDiffEq itself; right with adaptive = false",
    "Alshina3" => "does not arrive by steps of its own choice, in OrdinaryDiffEq itself; right with adaptive = false",
    "CKLLSRK54_3C" => "chooses steps that are too long: errors of 0.02 at 1e-6",
    "CKLLSRK85_4FM_4R" => "chooses steps that are too long, in OrdinaryDiffEq itself: errors of 0.1 at 1e-6; right with adaptive = false",
    "CKLLSRK95_4C" => "chooses steps that are too long: errors of 0.1 at 1e-6",
    "ESDIRK659L2SA" => "does not arrive by steps of its own choice, in OrdinaryDiffEq itself; right with adaptive = false",
    "FRK65" => "does not arrive by steps of its own choice, in OrdinaryDiffEq itself; right with adaptive = false",
    "Kvaerno3" => "of order 1 where time enters, in OrdinaryDiffEq itself: a stage has the wrong time; take KenCarp3",
    "Kvaerno4" => "of order 1 where time enters, in OrdinaryDiffEq itself: a stage has the wrong time; take KenCarp4",
    "Kvaerno5" => "of order 3 where time enters, in OrdinaryDiffEq itself: a stage has the wrong time; take KenCarp5",
    "PFRK87" => "does not arrive by steps of its own choice, in OrdinaryDiffEq itself; right with adaptive = false",
    "RKV76IIa" => "overwrites one of its stages, in OrdinaryDiffEq itself; take Vern7",
)

varies(alg) = occursin(r"VCAB|FBDF|QNDF$|DFBDF|DefaultODE", String(nameof(typeof(alg))))

const IMPLICIT = (OrdinaryDiffEqBDF, OrdinaryDiffEqFIRK, OrdinaryDiffEqRosenbrock, OrdinaryDiffEqSDIRK)
const MULTISTEP = (OrdinaryDiffEqAdamsBashforthMoulton, OrdinaryDiffEqBDF)

"Whether a method solves equations in each step, with a Jacobian over its whole state."
is_implicit(alg) = hasproperty(alg, :algs) ? any(is_implicit, alg.algs) : parentmodule(typeof(alg)) in IMPLICIT

"Explicit, stiff (implicit) or stabilised; multistep; adaptive or of fixed step."
function kind(alg)
    hasproperty(alg, :algs) && return "explicit or stiff, adaptive"
    family = parentmodule(typeof(alg))
    form = family === OrdinaryDiffEqStabilizedRK ? "stabilised" : is_implicit(alg) ? "stiff" : "explicit"
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
