# Wraps a network so that the time inside the solves and their pullbacks proper is told apart from the bridge's: what
# julia_speed.crossing() gives to the engine in the network's place. Included into `RNODEBridge`.

const NANOSECONDS = Ref(0)

function timed(work)
    start = time_ns()
    result = work()
    NANOSECONDS[] += time_ns() - start
    return result
end

"The network, in a bridge's call."
struct Timed
    network::RNODE.Dynamics
end

"Its solves, as `backward` takes them."
struct TimedSolves
    each::Vector{Any}
    solves::RNODE.Solves
end

function RNODE.solve_forward(network::Timed, θ, z0, probes, tspan, solver::RNODE.Solver; options...)
    solves = timed(() -> RNODE.solve_forward(network.network, θ, z0, probes, tspan, solver; options...))
    return TimedSolves(solves.each, solves)
end

RNODE.solve_backward!(z0_bar, θ̄, c̄, solves::TimedSolves, z_bar, q_bar) =
    timed(() -> RNODE.solve_backward!(z0_bar, θ̄, c̄, solves.solves, z_bar, q_bar))

RNODE.results!(z, q, solves::TimedSolves) = RNODE.results!(z, q, solves.solves)
RNODE.counts(solves::TimedSolves) = RNODE.counts(solves.solves)
RNODE.backward_count(solves::TimedSolves) = RNODE.backward_count(solves.solves)

"Wraps a network; seconds inside since the last call of `seconds_inside`."
wrap(network) = Timed(network)
seconds_inside() = (seconds = 1e-9 * NANOSECONDS[]; NANOSECONDS[] = 0; seconds)
