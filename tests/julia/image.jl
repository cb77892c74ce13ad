# What the package image holds: none of ReverseDiff's types (JuliaLang/julia#62047), and the default adjoint compiled. Prints
# "image <how many such types are named in it>", and "<solver>-<type> <seconds of a first gradient>".
pushfirst!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using LuxCore: LuxCore
using RNODE

let image = Base.ocachefile_from_cachefile(Base.pkgorigins[Base.PkgId(RNODE)].cachepath)
    text = read(image, String)
    occursin("RightHandSide", text) || error("names of types are not to be found in $image")
    println("image ", count(name -> occursin(name, text), ("TrackedReal", "TrackedArray", "GradientTape")))
end
for T in (Float32, Float64), name in ("RK4", "DP5", "Tsit5")
    dynamics = MLP(3, (5, 4))
    θ, z = fill(T(0.1), LuxCore.parameterlength(dynamics)), T[i - 0.3j for i in 1:3, j in 1:4]
    seconds = @elapsed begin
        _, back = pullback(dynamics, θ, z, Probes(ones(T, 3, 4, 1), 1.0), (0.0, 1.0), Solver(name; sensealg="InterpolatingAdjoint"))
        back(z, ones(T, 4, 3))
    end
    println("$name-$T ", seconds)
end
