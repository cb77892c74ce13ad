# Every solver that there is against a tight reference: `solvers.jl FILE [PATTERN]` solves one flow of 2-D samples with each, in a fixed
# tolerance or step, and adds a line "name|error|evaluations|milliseconds|what is wrong" to FILE after each, so that what was done is not lost.
# Solvers that FILE has already are left out.
push!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using LuxCore: LuxCore
using Random: Xoshiro
using RNODE

const DYNAMICS = MLP(2, (16,); activation="tanh")
const Z = randn(Xoshiro(1), 2, 3)
const θ = 0.5 .* randn(Xoshiro(0), LuxCore.parameterlength(DYNAMICS))

"Settings under which a method of any order should come within 1e-3: loose enough that those of low order end."
settings(row) = occursin("fixed", row.kind) ? (; step_size=row.order ≤ 1 ? 1 / 1024 : 1 / 64) : (; rtol=1e-6, atol=1e-6)

"One solve, which ends after 200,000 evaluations if not before: some methods choose no step at all, for ever."
function solve(solver)
    left = Ref(200_000)
    enough() = (left[] -= 1) < 0 ? error("did not end within 200,000 evaluations") : nothing
    return RNODE.listening(() -> integrate(DYNAMICS, θ, Z, exact_probes(), (0.0, 1.0), solver), enough)
end

function measured(row, exact)
    solver = Solver(row.name; settings(row)...)
    found = solve(solver)
    error = max(maximum(abs, found.z - exact.z), maximum(abs, found.l - exact.l))
    return error, found.stats.nfe, 1000 * minimum(@elapsed(solve(solver)) for _ in 1:3)
end

function main(file, pattern="")
    done = isfile(file) ? Set(first(split(line, "|")) for line in eachline(file)) : Set{String}()
    exact = solve(Solver("Vern9"; rtol=1e-13, atol=1e-13))
    for row in RNODE.describe_algorithms()
        !(row.name in done) && occursin(Regex(pattern), row.name) || continue
        line = try
            error, nfe, milliseconds = measured(row, exact)
            "$error|$nfe|$milliseconds|"
        catch exception
            "NaN|0|NaN|$(first(split(sprint(showerror, exception), '\n')))"
        end
        open(io -> println(io, row.name, "|", line), file, "a")
    end
end

main(ARGS...)
