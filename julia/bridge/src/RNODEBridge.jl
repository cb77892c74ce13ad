"""
What Python calls (pyrnode/engines/julia.py); apart from `RNODE`, so that Julia users need no Python. Every array is allocated by
torch, which stays its owner: Julia sees its memory for the length of a call, or for as long as the Python side keeps the
solve, and writes its results into it.
"""
module RNODEBridge

# It is small, and precompiling it would start a Python of its own. Within a system image it is compiled all the same.
const IN_IMAGE = ccall(:jl_generating_output, Cint, ()) == 1 && Base.JLOptions().incremental == 0
IN_IMAGE || __precompile__(false)

"""
Tells PythonCall of the Python that it is in, where it starts with Julia itself, out of a system image: before juliacall can tell it.
Newer ones read the variable themselves (JuliaPy/PythonCall.jl#781). It stands before `using PythonCall`, since modules start in the
order in which they were made.
"""
module Embedding

const VARIABLE = "__JULIA_PYTHONCALL_EMBEDDED_LIBPTR__"

function __init__()
    haskey(ENV, VARIABLE) && !isdefined(Main, :__PythonCall_libptr) || return nothing
    Core.eval(Main, :(global __PythonCall_libptr = Ptr{Cvoid}($(parse(UInt, ENV[VARIABLE])))))
    return nothing
end

end

using LinearAlgebra: BLAS
using PythonCall: C, PythonCall, Py, PyException, getptr, pybuiltins, pyconvert
using DLPack: DLPack
using RNODE: RNODE, Asked, ConvNet, Cotangents, Dynamics, Evaluation, MLP, PotentialNetwork, Probes, SolveError, Solver
using RNODE: backward_count, counts, exact_probes, listening, matrix, piece, results!, solve_backward!, solve_forward

# --- arrays ---

"""
The memory of a torch tensor as an array with its axes reversed, without a copy: a CPU's from a DLPack capsule, which stays
Python's; a GPU's through DLPack.jl. The caller keeps the tensor.
"""
view_of(::Nothing) = nothing
view_of(x::Array) = x
function view_of(x::Py)
    C.PyObject_IsInstance(getptr(x), C.POINTERS.PyCapsule_Type) == 1 || return DLPack.from_dlpack(x)
    place = C.PyCapsule_GetPointer(getptr(x), "dltensor")
    if place == C_NULL
        C.PyErr_Clear()
        throw(ArgumentError("a DLPack capsule that is used already, or of another version than this bridge reads"))
    end
    tensor = unsafe_load(Ptr{DLPack.DLTensor}(place))
    bits = tensor.dtype.bits
    tensor.dtype.code == Integer(DLPack.kDLFloat) && bits in (32, 64) || throw(ArgumentError("an array of other numbers than float32 and float64"))
    return bits == 32 ? host_array(Float32, tensor, Val(Int(tensor.ndim))) : host_array(Float64, tensor, Val(Int(tensor.ndim)))
end

function host_array(::Type{T}, tensor, ::Val{N}) where {T,N}
    axis(p, i) = Int(unsafe_load(p, N - i + 1))
    shape, strides = ntuple(i -> axis(tensor.shape, i), Val(N)), ntuple(i -> axis(tensor.strides, i), Val(N))
    any(i -> shape[i] > 1 && strides[i] != prod(shape[1:(i - 1)]), 1:N) && throw(ArgumentError("an array that is not in C order"))
    return unsafe_wrap(Array, Ptr{T}(tensor.data + tensor.byte_offset), shape)
end

"The address of an array's memory, so that a test can see that it was not copied."
address(x) = Int(UInt(pointer(view_of(x))))

"Waits for a GPU's work on this side, before the other side reads the results; nothing to wait for on a CPU."
synchronize(::Array) = nothing
synchronize(x) = RNODE.MLDataDevices.functional(RNODE.MLDataDevices.get_device_type(x)) ? wait_for(x) : nothing
wait_for(x) = (sum(view(x, 1:1)); nothing)  # a value read back to the host comes after all that was queued before it

# --- dynamics and solvers ---

function network(kind, event, hidden, activation, time, kernel_size, context)
    size = Tuple(pyconvert(Vector{Int}, event))
    widths = Tuple(pyconvert(Vector{Int}, hidden))
    activation, time = pyconvert(String, activation), Symbol(pyconvert(String, time))
    context = pyconvert(Bool, context)
    pyconvert(String, kind) == "mlp" && return MLP(only(size), widths; activation, time, context)
    return ConvNet(reverse(size), widths; activation, time, kernel_size=pyconvert(Int, kernel_size), context)
end

function potential(dim, hidden, activation, time, rank, context)
    activation, time = pyconvert(String, activation), Symbol(pyconvert(String, time))
    rank, context = pyconvert(Int, rank), pyconvert(Bool, context)
    return PotentialNetwork(pyconvert(Int, dim), Tuple(pyconvert(Vector{Int}, hidden)); activation, time, rank, context)
end

function solver(name, sensealg, numbers, error_control, memory, options)
    step_size, rtol, atol, maxiters = pyconvert(Vector{Float64}, numbers)
    keywords = Dict(Symbol(pyconvert(String, k)) => plain(v) for (k, v) in pyconvert(Dict{Any,Any}, options))
    return Solver(
        pyconvert(String, name); step_size, rtol, atol, maxiters=Int(maxiters), sensealg=pyconvert(String, sensealg),
        error_control=Symbol(pyconvert(String, error_control)), memory=Symbol(pyconvert(String, memory)), keywords...,
    )
end

"An option's value: a number, truth value, text or list of them (Python has seen to that), and nothing that could be code."
plain(x::Union{Bool,Int,Float64,String}) = x
plain(x::AbstractVector) = map(plain, x)
plain(x::Py) = plain(pyconvert(Any, x))
plain(x) = throw(ArgumentError("an option of type $(typeof(x)): expected a number, truth value, text or list of them"))

"""
Dynamics that only Python can evaluate, such as a user's own `torch.nn.Module`. Everything goes through buffers that both
sides see, so that a call carries no arrays.
"""
Base.@kwdef struct ForeignDynamics{A,C,W,V} <: Dynamics
    linearize::Py    # (t, probe, tape): z, c, ε → f, w, r, the residual of the Hamilton-Jacobi equation
    pull::Py         # (has_w): their cotangents → z̄, c̄, the gradient of θ gathered by Python's bound dynamics
    collect::Py      # (): the gathered gradient → θ̄
    z::A
    c::C
    ε::W
    f::A
    w::W
    r::Union{Nothing,A}
    hjb::Union{Nothing,A}
    f̄::A
    w̄::W
    r̄::Union{Nothing,A}
    hjb_bar::Union{Nothing,A}
    z̄::A
    c̄::C
    θ̄::V
end

"The dynamics that call `linearize`, `pull` and `collect`, on the buffers that Python's `Foreign` names."
function foreign(
    linearize, pull, collect; z, c, eps, f, w, r, hjb, f_bar, w_bar, r_bar, hjb_bar, z_bar, c_bar, theta_bar,
)
    state = matrix(view_of(z))
    flat(x) = x === nothing ? nothing : matrix(view_of(x))
    row(x) = x === nothing ? nothing : reshape(view_of(x), 1, :)
    probes(x) = x === nothing ? nothing : reshape(view_of(x), size(state)..., :)
    return ForeignDynamics(;
        linearize=Py(linearize), pull=Py(pull), collect=Py(collect), z=state, c=view_of(c), ε=probes(eps), f=flat(f), w=probes(w),
        r=flat(r), hjb=row(hjb), f̄=flat(f_bar), w̄=probes(w_bar), r̄=flat(r_bar), hjb_bar=row(hjb_bar), z̄=flat(z_bar),
        c̄=view_of(c_bar), θ̄=view_of(theta_bar),
    )
end

RNODE.context_length(d::ForeignDynamics) = d.c === nothing ? 0 : size(d.c, 1)

RNODE.has_potential(d::ForeignDynamics) = d.hjb !== nothing
RNODE.has_total_derivative(d::ForeignDynamics) = d.r !== nothing
RNODE.threaded(::ForeignDynamics) = false
RNODE.bind(dynamics::ForeignDynamics, θ, z0, ::Asked) = dynamics

function RNODE.evaluate!(d::ForeignDynamics, t, z, c, ε, tape::Bool)
    copyto!(d.z, z)
    c === nothing || copyto!(d.c, c)
    ε === nothing || copyto!(d.ε, ε)
    d.linearize(Float64(t), ε !== nothing, tape)
    return ε === nothing ? Evaluation(d.f) : Evaluation(d.f; d.w, d.r, d.hjb)
end

function RNODE.pullback!(d::ForeignDynamics, z̄, c̄, bars::Cotangents, α)
    copyto!(d.f̄, bars.f)
    for (buffer, bar) in ((d.w̄, bars.w), (d.r̄, bars.r), (d.hjb_bar, bars.hjb))
        bar === nothing || copyto!(buffer, bar)
    end
    d.pull(bars.w !== nothing)
    c̄ === nothing || (c̄ .+= α .* d.c̄)
    return copyto!(z̄, d.z̄)
end

function RNODE.gradient!(θ̄, d::ForeignDynamics)
    d.collect()
    return θ̄ .+= d.θ̄
end

# --- one solve ---

"""
Integrates, writes the state to `z` and the integrals to `q` (4 or 5, batch), and gives what `backward` needs, if `record`, with the
counts (nfe, nfe_max, accepted, rejected). The probes are `ε`, the unit vectors (`axes`), or none.
"""
function forward(dynamics, solver, θ, z0, context, ε, weight, axes, t0, t1, total_derivative, hjb, record, z, q)
    z0, context, ε = view_of(z0), view_of(context), view_of(ε)
    probes = axes ? exact_probes() : ε === nothing ? nothing : Probes(ε, Float64(weight))
    solves = listening(signals) do
        solve_forward(dynamics, view_of(θ), z0, probes, (t0, t1), solver; context, total_derivative, hjb, record)
    end
    state, q = matrix(view_of(z)), view_of(q)
    integrals = fill!(similar(q, reverse(size(q))), false)
    results!(state, integrals, solves)
    permutedims!(q, integrals, (2, 1))
    synchronize(state)
    return record ? solves : nothing, counts(solves)...
end

"""
Writes the cotangents of the start state, of the context and of θ, one after the other, to `bars`, given those of `z` and `q`; gives
the mean number of evaluations.
"""
function backward(solves, z_bar, q_bar, context_length, bars)
    foreach(solve -> solve.system.nfe_backward = 0, solves.each)
    z_bar = matrix(view_of(z_bar))
    z0_bar, c̄, θ̄ = split_bars(fill!(view_of(bars), false), size(z_bar)..., context_length)
    q̄ = permutedims(view_of(q_bar))
    listening(() -> solve_backward!(z0_bar, θ̄, c̄, solves, z_bar, q̄), signals)
    synchronize(θ̄)
    return backward_count(solves)
end

function split_bars(bars, d, batch, context_length)
    ends = cumsum((d * batch, context_length * batch))
    z0_bar, c̄ = piece(bars, 1:ends[1]), context_length == 0 ? nothing : piece(bars, (ends[1] + 1):ends[2])
    θ̄ = piece(bars, (ends[2] + 1):length(bars))
    return reshape(z0_bar, d, batch), c̄ === nothing ? nothing : reshape(c̄, context_length, batch), θ̄
end

"""
Lets Python answer signals in the midst of a solve, as it would between two of its own instructions: handlers run in its main thread,
and what they raise ends the solve.
"""
signals() = ccall(CHECK_SIGNALS[], Cint, ()) == 0 ? nothing : PythonCall.Core.pythrow()

const CHECK_SIGNALS = Ref(C_NULL)

"Whether each sample of a batch is solved on its own."
is_separate(solver::Solver, z0) = RNODE.separate(solver, view_of(z0))

# --- errors, and what there is ---

"An exception as Python can act on it: (kind, status, message), and of a failed solve its numbers (`JuliaFailure`)."
describe(e::SolveError) =
    ("solve", e.status, sprint(showerror, e), e.time, e.bad, e.stopped, e.batch, e.at_start, e.adjoint)
describe(e::InterruptException) = ("interrupt", "", "")
describe(e::Union{ArgumentError,DimensionMismatch}) = ("argument", "", e.msg)
describe(e::TaskFailedException) = describe(e.task.exception)
describe(e::CompositeException) = describe(first(e.exceptions))
describe(e) = ("other", string(nameof(typeof(e))), first(split(sprint(showerror, e), "\n")))

"The Python exception inside a Julia one, if that is what it is."
original(e::PyException) = e.v
original(e::TaskFailedException) = original(e.task.exception)
original(e::CompositeException) = original(first(e.exceptions))
original(e) = nothing

function start()
    Threads.nthreads() > 1 && BLAS.set_num_threads(1)  # a batch is split over them, and each multiplies matrices of its own
    CHECK_SIGNALS[] = Base.Libc.Libdl.dlsym(C.python_library_handle(), :PyErr_CheckSignals)
    Base.cumulative_compile_timing(true)
    return nothing
end

"Seconds that Julia has compiled for since it was started."
compile_seconds() = first(Base.cumulative_compile_time_ns()) / 1e9

"Bytes of the objects that are left when the collector has run."
live_bytes() = (GC.gc(); Base.gc_live_bytes())

version() = "$VERSION with $(Threads.nthreads()) thread$(Threads.nthreads() == 1 ? "" : "s")"

names() = sort!(collect(keys(RNODE.algorithms())))

is_known(name) = RNODE.is_known(pyconvert(String, name))

is_adaptive(solver::Solver) = solver.adaptive

"`RNODE.describe_algorithms` as JSON."
solvers() = RNODE.JSON.json(RNODE.describe_algorithms())

end
