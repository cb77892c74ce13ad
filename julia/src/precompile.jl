# What a first solve would otherwise spend a minute on. A solver is compiled for the type of the state alone, so one small
# network stands for all dynamics (see `RightHandSide`).
#
# SciMLSensitivity's default adjoint is here with its backward solve; the other adjoints take some seconds on first use. Its own
# code may come into the package image because it takes the products from us (see `ode_function`) and because the workload is made
# of functions with known types (see `dynamic`): else it brings types of ReverseDiff, and Julia crashes when it loads such an
# image (JuliaLang/julia#62047; tests/julia/image.jl looks for them).

function workload(::Type{T}) where {T}
    table, image = MLP(2, (16,)), ConvNet((4, 4, 1), (2,))
    states = (T[0.1 -0.3 0.5; 0.7 0.2 -0.4], T[sin(i + 3j + 5b) for i in 1:4, j in 1:4, _ in 1:1, b in 1:2])
    for sensealg in ("Backprop", "InterpolatingAdjoint")
        foreach(name -> dynamic(exercise, table, states[1], Solver(name; sensealg)), ("RK4", "DP5", "Tsit5"))
        foreach(name -> dynamic(exercise, image, states[2], Solver(name; sensealg)), ("RK4", "DP5"))
    end
    return nothing
end

function exercise(dynamics, z::Array{T}, solver) where {T}
    θ = fill(T(0.1), LuxCore.parameterlength(dynamics))
    probes = Probes(fill!(similar(z, size(z)..., 1), one(T)), 1.0)
    solves = solve_forward(dynamics, θ, z, probes, (0.0, 1.0), solver; record=true)
    dynamic(finish, solves, matrix(z), fill(one(T), size(z, ndims(z)), 5), θ)
    back = solve_forward(dynamics, θ, z, nothing, (1.0, 0.0), solver)
    dynamic(results!, similar(matrix(z)), fill(zero(T), size(z, ndims(z)), 5), back)
    return nothing
end

function finish(solves, z, q_bar, θ)
    solve_backward!(similar(z), fill!(similar(θ), false), nothing, solves, z, q_bar)
    results!(similar(z), similar(q_bar), solves)
    counts(solves)
    return nothing
end

@compile_workload begin
    workload(Float32)
    workload(Float64)
    forget_memory!()
    empty!(TABLEAUS)  # its keys are hashed by what is new in each process
end
