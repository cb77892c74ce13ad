# Solves that fail, and solves that are interrupted. The words are Python's (pyrnode/engines/julia_words.py).

"""
A solve that did not reach its end time, or is not finite there: SciML's return code and the time. `bad` of the batch's samples are not
finite, `stopped` did not arrive, and for `at_start` the rate was not finite at the start already. `adjoint`: it was the solve backwards.
"""
Base.@kwdef struct SolveError <: Exception
    status::String
    time::Float64
    bad::Int = 0
    stopped::Int
    batch::Int
    at_start::Int = 0
    adjoint::Bool = false
end

Base.showerror(io::IO, e::SolveError) = print(
    io, e.adjoint ? "the adjoint's solve" : "the solve", " ended with $(e.status) at t = $(round(e.time; sigdigits=4)) (",
    e.at_start > 0 ? "the rate at the start is not finite for $(e.at_start) of $(e.batch) samples" :
    e.bad > 0 ? "$(e.bad) of $(e.batch) samples not finite" : "$(e.stopped) of $(e.batch) samples did not arrive", ")",
)

"Throws where a solve has failed, by its return code or by what it gives."
function check(path, system::Augmented, adaptive::Bool)
    u, batch = last(path.u), system.shape[2]
    finished = SciMLBase.successful_retcode(path)
    finished && isfinite(sum(u)) && return nothing
    bad = not_finite(system, u)
    finished && bad == 0 && return nothing  # the sum alone is too large
    # An adaptive solver goes on from a rate that is no number as it can, and ends with whatever return code.
    at_start = adaptive ? start_not_finite(system, path.prob) : 0
    status, stopped = finished ? "Unstable" : string(path.retcode), finished || (!adaptive && bad > 0) ? bad : batch
    throw(SolveError(; status, time=last(path.t), bad, stopped, batch, at_start))
end

"How many samples' parts of a flat state are not finite."
function not_finite(system::Augmented, u)
    z, q = parts(system, u)
    return count(!, vec(all(isfinite, z; dims=1)) .& vec(all(isfinite, q; dims=2)))
end

start_not_finite(system, problem) =
    not_finite(system, rate!(similar(problem.u0), system, problem.u0, first(problem.tspan)))

"One error for the solves that failed: the first, if it is not a solve's, or else that of the earliest time."
function together(failed, batch)
    other = findfirst(x -> !(x isa SolveError), failed)
    other === nothing || return failed[other]
    first = argmin(x -> abs(x.time), failed)
    total(count) = sum(count, failed)
    return SolveError(;
        first.status, first.time, bad=total(x -> x.bad), stopped=total(x -> x.stopped), batch, at_start=total(x -> x.at_start),
    )
end

"""
An algorithm whose solves are looked at. SciMLSensitivity takes the end of the adjoint's solve for its end time, whether it has been
reached or not: the gradient would be wrong without a word.
"""
struct Watched{A<:SciMLBase.AbstractODEAlgorithm} <: SciMLBase.AbstractODEAlgorithm
    alg::A
    batch::Int
end

function SciMLBase.solve(problem::ODEProblem, watched::Watched; options...)
    path = SciMLBase.solve(problem, watched.alg; options...)
    SciMLBase.successful_retcode(path) && return path
    status, stopped, batch = string(path.retcode), watched.batch, watched.batch
    throw(SolveError(; status, time=last(path.t), stopped, batch, adjoint=true))
end

SciMLBase.forwarddiffs_model(watched::Watched) = SciMLBase.forwarddiffs_model(watched.alg)
SciMLBase.forwarddiffs_model_time(watched::Watched) = SciMLBase.forwarddiffs_model_time(watched.alg)

# --- interruption ---

"""
Who may interrupt a solve from outside: `ask` is called before each evaluation in the task that wanted the solve, and may throw. The
tasks of the other threads then end too. (Julia's own Ctrl-C needs none of this.)
"""
mutable struct Listener
    const ask::Any
    const task::Task
    @atomic heard::Bool
end

const LISTENER = Ref{Union{Nothing,Listener}}(nothing)

"Runs `work`, while `ask` is asked before each evaluation."
function listening(work, ask)
    former, LISTENER[] = LISTENER[], Listener(ask, current_task(), false)
    try
        return work()
    finally
        LISTENER[] = former
    end
end

hear() = (listener = LISTENER[]; listener === nothing || hear(listener))

function hear(listener::Listener)
    (@atomic listener.heard) && throw(InterruptException())
    listener.task === current_task() || return nothing
    try
        listener.ask()
    catch
        @atomic listener.heard = true
        rethrow()
    end
    return nothing
end
