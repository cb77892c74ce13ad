# What the package image holds: none of ReverseDiff's types (JuliaLang/julia#62047), and the default adjoint compiled. Run with
# `--trace-compile` into the file that TRACE names; prints "image <how many such types are named in it>", and how many methods of
# SciMLSensitivity's backward problem were compiled for the default adjoint, and for a solver that is not in the image.
push!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using LuxCore: LuxCore
using RNODE

let image = Base.ocachefile_from_cachefile(Base.pkgorigins[Base.PkgId(RNODE)].cachepath)
    text = read(image, String)
    occursin("RightHandSide", text) || error("names of types are not to be found in $image")
    println("image ", count(name -> occursin(name, text), ("TrackedReal", "TrackedArray", "GradientTape")))
end

function gradient(name, ::Type{T}) where {T}
    dynamics = MLP(3, (20, 16))
    θ, z = fill(T(0.1), LuxCore.parameterlength(dynamics)), T[i - 0.3j for i in 1:3, j in 1:4]
    _, back = pullback(dynamics, θ, z, Probes(ones(T, 3, 4, 1), 1.0), (0.0, 1.0), Solver(name; sensealg="InterpolatingAdjoint"))
    return back(z, ones(T, 4, 3))
end

compiled() = count(contains("AdjointSensitivityFunction"), eachline(ENV["TRACE"]))

foreach(name -> (gradient(name, Float32); gradient(name, Float64)), ("RK4", "DP5", "Tsit5"))
println("default ", compiled())
gradient("BS3", Float32)
println("other ", compiled())
