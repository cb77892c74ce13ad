# The package by itself: `Pkg.test("RNODE")`. The engine as Python sees it is tested in tests/.
using Distributions
using LinearAlgebra: Diagonal, I
using Random: Xoshiro
using RNODE
using RNODE: Lux, LuxDynamics
using RNODE.LuxCore: parameterlength
using Test

"A flow whose parameters are not small, of which nothing is known."
function some_flow(dynamics, rng; solver=Solver("Vern7"; rtol=1e-10, atol=1e-10))
    layer = RNODELayer(dynamics; solver)
    θ = 0.4 .* randn(rng, parameterlength(dynamics))
    affine = RNODE.Affine([1.0, -2.0], [0.5, 2.0], [0.6 -0.8; 0.8 0.6], [0.7, 1.2])
    return RNODEDistribution([layer, layer], [θ, -θ], [affine])
end

const NETWORKS = [MLP(2, (8, 8); activation="tanh"), MLP(2, (8,); time=:concatsquash), PotentialNetwork(2, (6, 6); rank=2)]

@testset "RNODE" begin
    @testset "a distribution" begin
        for dynamics in NETWORKS
            d = some_flow(dynamics, Xoshiro(1))
            @test d isa ContinuousMultivariateDistribution
            @test (length(d), eltype(d)) == (2, Float64)
            x = rand(Xoshiro(2), d, 5)
            density = logpdf(d, x)
            @test size(x) == (2, 5)
            @test [logpdf(d, x[:, i]) for i in 1:5] ≈ density atol = 1e-8
            @test pdf(d, x[:, 1]) ≈ exp(density[1]) atol = 1e-8
            @test loglikelihood(d, x) ≈ sum(density) atol = 1e-8
            @test logpdf!(zeros(5), d, x) == density
            @test rand(Xoshiro(3), d) == vec(rand(Xoshiro(3), d, 1))
            # A change of variables: the density at x(z) is that of z over the volume that the generator makes of a small cube.
            z, h = [0.3, -0.2], 1e-5
            at(z) = vec(RNODE.generate(d, reshape(z, 2, 1)))
            J = hcat(((at(z + h * I(2)[:, i]) - at(z - h * I(2)[:, i])) ./ 2h for i in 1:2)...)
            expected = logpdf(MvNormal(zeros(2), I), z) - log(abs(J[1, 1] * J[2, 2] - J[1, 2] * J[2, 1]))
            @test logpdf(d, at(z)) ≈ expected atol = 1e-6
            @test_throws DimensionMismatch logpdf(d, ones(3, 2))
        end
        one = RNODELayer(MLP(2, (4,)))
        @test logpdf(RNODEDistribution(one, (; θ=zeros(28))), [0.5, 0.5]) ≈ logpdf(MvNormal(zeros(2), I), [0.5, 0.5]) atol = 1e-12  # f = 0
        @test_throws DimensionMismatch RNODEDistribution(one, (; θ=zeros(3)))
        @test_throws ArgumentError RNODEDistribution(RNODELayer(ConvNet((4, 4, 1), (2,))), (; θ=zeros(3)))
    end

    @testset "fit" begin
        rng, truth = Xoshiro(1), MvNormal([1.0, -1.0], Diagonal([4.0, 0.25]))
        X = rand(rng, truth, 1500)
        d = fit(RNODELayer, X; steps=60, batch=150, rng, dynamics=MLP(2, (8,); activation="tanh"), accurate=Solver("RK4"; step_size=0.125))
        test = rand(rng, truth, 500)
        @test 0 < (sum(logpdf(truth, test)) - sum(logpdf(d, test))) / 500 < 0.05  # a tenth of what one misses without a scale
        two = MixtureModel([MvNormal([shift, 0.0], Diagonal([1.0, 1.0])) for shift in (-4.0, 4.0)])
        X2, test = rand(rng, two, 1500), rand(rng, two, 500)
        quick = (; dynamics=MLP(2, (8,); activation="tanh"), accurate=Solver("RK4"; step_size=0.125), batch=150, rate=0.01)
        gap(steps) = (sum(logpdf(two, test)) - sum(logpdf(fit(RNODELayer, X2; steps, rng=Xoshiro(2), quick...), test))) / 500
        @test gap(200) < 0.4 < 0.6 < gap(1)  # what is best on validation is kept: 0.21, and 0.72 untrained
        @test_throws ArgumentError fit(RNODELayer, ones(2, 20))
        @test_throws ArgumentError fit(RNODELayer, [NaN; ones(19)]')
        @test_throws ArgumentError fit(RNODELayer, X; steps=0)
        @test_throws ArgumentError fit(RNODELayer, X; validation=1.0)
    end

    @testset "files" begin
        mktempdir() do folder
            path = joinpath(folder, "model.safetensors")
            x = [0.5 -1.0; 2.0 0.1]
            for dynamics in NETWORKS
                d = some_flow(dynamics, Xoshiro(1))
                save_flow(path, d)
                @test logpdf(load_flow(folder), x) == logpdf(d, x)
            end
            bytes = read(path)
            bytes[end - 3] ⊻= 0x01
            write(path, bytes)
            @test_throws "its digest is another" load_flow(path)
            write(path, bytes[1:(end - 40)])
            @test_throws "cannot be read as a flow" load_flow(path)
            @test_throws "does not exist" load_flow(joinpath(folder, "nothing"))
            own = some_flow(LuxDynamics(Lux.Dense(2 => 2), Lux.setup(Xoshiro(0), Lux.Dense(2 => 2))...; event=(2,), time=:none), Xoshiro(1))
            @test_throws "cannot be described in a file" save_flow(path, own)
        end
    end

    @testset "JSON as Python has it" begin
        numbers = [1.0, 0.1, 1e-5, 1e-4, 123456.0, 1e15, 1e16, 1.5e-7, 1e22, -2.5, 1.2345e17, 0.0]
        texts = ["1.0", "0.1", "1e-05", "0.0001", "123456.0", "1000000000000000.0", "1e+16", "1.5e-07", "1e+22", "-2.5", "1.2345e+17", "0.0"]
        @test RNODE.python_float.(numbers) == texts
        @test RNODE.write_json(["a" => nothing, "é\n" => Any[true, 1, "x"]]) == "{\"a\": null, \"\\u00e9\\n\": [true, 1, \"x\"]}"
        @test RNODE.read_json(" {\"a\": [1, -2.5e1, \"x\\u00e9\\ud83d\\ude00\"], \"b\": {}} ") ==
              Dict("a" => Any[1, -25.0, "xé😀"], "b" => Dict{String,Any}())
        for wrong in ("", "{", "[1,]", "{\"a\" 1}", "\"x", "[1] 2", "nul", "\"\\q\"", "["^99)
            @test_throws Union{ArgumentError,BoundsError} RNODE.read_json(wrong)  # JSON.jl's own; `load_flow` makes one of all
        end
    end

    @testset "solvers" begin
        for name in ("Rosenbrock23", "AutoTsit5(Rosenbrock23)", "Tsit5", "ROCK2")
            @test Solver(name).sensealg == "GaussAdjoint"
        end
        @test Solver("RK4").sensealg == Solver("Tsit5"; adaptive=false).sensealg == Solver("VCABM").sensealg == "InterpolatingAdjoint"
        @test Solver("FBDF").sensealg == "QuadratureAdjoint"
        @test Solver("FBDF"; memory=:checkpoint).sensealg == "GaussAdjoint"
        @test Solver("QBDF2").alg isa RNODE.OrdinaryDiffEqBDF.QNDF2
        for (name, options, words) in (
            ("Tsit5", (; dtmin=1, dtmax=0.5), "longer than the longest"), ("Tsit5", (; reltol=1), "the solver's rtol"),
            ("FBDF", (; max_order=9), "a whole number from 1 to 5"), ("AutoTsit5(Nobody)", (;), "unknown solver"),
            ("Tsit5", (; sensealg="QuadratureAdjoint", memory=:checkpoint), "needs the dense solution"),
        )
            @test_throws words Solver(name; options...)
        end
        # What is thrown while a solve runs ends it, in all of its threads.
        count = Ref(0)
        stop() = (count[] += 1) == 7 ? throw(InterruptException()) : nothing
        @test_throws InterruptException RNODE.listening(stop) do
            integrate(NETWORKS[1], zeros(parameterlength(NETWORKS[1])), zeros(2, 3), nothing, (0.0, 1.0), Solver("RK4"; step_size=1e-3))
        end
        @test count[] == 7
        @test RNODE.LISTENER[] === nothing
    end
end
