# Flows that Python wrote, read in Julia, and written again for Python to read: `files.jl FOLDER`. Every `NAME.safetensors` there has its
# points in `NAME.x` and Python's log-densities in `NAME.p`, little-endian doubles, one sample after the other. Prints
# "<NAME> <largest difference>", and leaves `NAME.back`; of `refused`, which has what Julia does not know, 0 where it says so.
push!(LOAD_PATH, joinpath(@__DIR__, "..", "..", "julia"))

using RNODE

numbers(path) = collect(reinterpret(Float64, read(path)))

for file in filter(endswith(".safetensors"), readdir(only(ARGS); join=true))
    name = first(splitext(file))
    if basename(name) == "refused"
        message = try
            load_flow(file)
            "it was read"
        catch error
            error.msg
        end
        println("refused ", occursin("bounds or a period", message) ? 0 : 1)
        continue
    end
    d = load_flow(file)
    x = reshape(numbers("$name.x"), length(d), :)
    println(basename(name), " ", maximum(abs, RNODE.Distributions.logpdf(d, x) - numbers("$name.p")))
    save_flow("$name.back", d)
end
