# The methods that are marked as wrong, by OrdinaryDiffEq alone: of RNODE only their names are asked. u' = (sin u₂ + t/2, −u₁ cos t) up to 1.
# A line each: "name|errors at 1e-3, 1e-6, 1e-9 (or how it ended)|errors with steps of 1/16, 1/32, 1/64|wrong". Wrong is what does not arrive, is off
# by a thousand tolerances, or is of a lower order than it says; AdaptiveRadau is solved from 300 starts, up to 3.
push!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using Random: Xoshiro
using RNODE
using RNODE.SciMLBase: ODEProblem, SciMLBase

swing!(du, u, p, t) = (du[1] = sin(u[2]) + t / 2; du[2] = -u[1] * cos(t); nothing)
swings!(du, u, p, t) = (du[1] = sin(3u[2]) + t / 2; du[2] = -u[1] * cos(3t); nothing)
problem(f, u, stop) = ODEProblem{true}(f, u, (0.0, stop))
solve(problem, name; options...) = SciMLBase.solve(problem, algorithm(name); verbose=false, maxiters=100_000, options...)

const PROBLEM = problem(swing!, [0.3, -0.8], 1.0)
const EXACT = last(solve(PROBLEM, "Vern9"; reltol=1e-13, abstol=1e-13).u)

function outcome(name; options...)
    found = solve(PROBLEM, name; options...)
    SciMLBase.successful_retcode(found) || return Inf, string(found.retcode)
    error = maximum(abs, last(found.u) - EXACT)
    return error, string(round(error; sigdigits=1))
end

function judged(name)
    chosen = [outcome(name; reltol=tol, abstol=tol) for tol in (1e-3, 1e-6, 1e-9)]
    fixed = [outcome(name; adaptive=false, dt) for dt in (1 / 16, 1 / 32, 1 / 64)]
    observed = log2(first(fixed[2]) / first(fixed[3]))
    claimed = Int(SciMLBase.alg_order(algorithm(name)))
    low = first(fixed[3]) > 1e-12 && observed < claimed - 1
    wrong = low || any(first.(chosen) .> 1000 .* (1e-3, 1e-6, 1e-9))
    return join([name, join(last.(chosen), ", "), join(last.(fixed), ", "), wrong ? "wrong" : "right"], "|")
end

function from_many_starts(name; options...)
    rng = Xoshiro(0)
    starts = [2 .* randn(rng, 2) for _ in 1:300]
    failed(; more...) = count(starts) do u
        found = SciMLBase.solve(problem(swings!, u, 3.0), algorithm(name; more...); reltol=1e-6, abstol=1e-6, verbose=false)
        !SciMLBase.successful_retcode(found)
    end
    all, kept = failed(), failed(; options...)
    return "$name|$all of 300 starts fail|$kept with $(only(keys(options))) = $(only(values(options)))|$(all > 0 == kept ? "wrong" : "right")"
end

for name in sort!(collect(keys(RNODE.FAULTS)))
    println(name == "AdaptiveRadau" ? from_many_starts(name; max_order=5) : judged(name))
    flush(stdout)
end
