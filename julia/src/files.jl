# Flows as files that Python reads and writes too (pyrnode/checkpoint.py, pyrnode/files.py): safetensors with a description.

const FORMAT = 2
const NUMBERS = Dict("F32" => Float32, "F64" => Float64)

"Python's name of a type, and safetensors'."
type_names(::Type{Float32}) = ("torch.float32", "F32", "float32")
type_names(::Type{Float64}) = ("torch.float64", "F64", "float64")

"A tensor of a file: its sizes in Python's order, the slowest first, and its numbers as they lie."
struct FileTensor{T<:Union{Float32,Float64}}
    size::Vector{Int}
    values::Vector{T}
end

"""
    load_flow(path; solver=nothing)

Reads a flow that Python's `Flow.save` or training wrote (`model.safetensors`, or the folder of a run), as an
[`RNODEDistribution`](@ref). It computes with the solver that the file names for scores, or with `solver`, in the numbers that the parameters
are stored in, and gives Python's log-densities. Throws `ArgumentError` for files that are damaged or none of pyrnode's, for flows that are not of
vectors, or take a context, and for columns with bounds or a period.
"""
function load_flow(path::AbstractString; solver::Union{Nothing,Solver}=nothing)
    path = isdir(path) ? joinpath(path, "model.safetensors") : path
    isfile(path) || throw(ArgumentError("$path does not exist"))
    tensors, description = try
        read_file(path)
    catch error
        error isa InterruptException && rethrow()
        why = error isa ArgumentError ? error.msg : sprint(showerror, error)
        throw(ArgumentError("$path cannot be read as a flow of pyrnode's: $why"))
    end
    config, shape = description["config"], description["event_shape"]
    unlike(what) = throw(ArgumentError("$path holds a flow $what: RNODE reads flows of vectors, without a context; load it with Python"))
    length(shape) == 1 && description["levels"] === nothing || unlike("of images")
    description["context_dim"] == 0 || unlike("with a context")
    any(v -> v !== nothing && !isempty(v), values(get(config, "columns", Dict{String,Any}()))) && unlike("with columns that have bounds or a period")
    setting(default, names...) = foldl((table, name) -> table isa AbstractDict ? get(table, name, default) : default, names; init=config)
    dynamics = network_of(only(shape), (default, name) -> setting(default, "flow", "network", name))
    solver === nothing && (solver = solver_of((default, name) -> setting(default, "evaluation", "solver", name)))
    tspan = (0.0, Float64(setting(1.0, "flow", "end_time")))
    count = setting(1, "flow", "blocks")
    layers = [RNODELayer(dynamics, tspan; solver) for _ in 1:count]
    θ = [reduce(vcat, [tensor(tensors, "parts.$(i - 1).dynamics.$name", size) for (name, size) in layout(dynamics)]) for i in 1:count]
    return RNODEDistribution(layers, θ, transforms_of(tensors, only(shape), unlike))
end

function network_of(dim, setting)
    kind, hidden, time = setting("auto", "kind"), Tuple(Int.(setting([64, 64, 64], "hidden"))), Symbol(setting("concat", "time"))
    activation = setting("softplus", "activation")
    kind in ("auto", "mlp") && return MLP(dim, hidden; activation, time)
    kind == "potential" && return PotentialNetwork(dim, hidden; activation, time, rank=setting(10, "rank"))
    throw(ArgumentError("network.kind = $(repr(kind)): expected 'mlp' or 'potential'"))
end

function solver_of(setting)
    options = Dict(Symbol(k) => v isa Vector ? identity.(v) : v for (k, v) in setting(Dict{String,Any}(), "options"))
    setting(true, "adaptive") || (options[:adaptive] = false)
    return Solver(
        setting("DP5", "name"); step_size=setting(0.25, "step_size"), rtol=setting(1e-5, "rtol"), atol=setting(1e-5, "atol"),
        error_control=Symbol(setting("density", "error_control")), maxiters=setting(10_000, "maxiters"), options...,
    )
end

"Names and sizes of the parameters in θ, in order, as Python has them."
function layout(dynamics::Layered{<:Any,<:Any,0})
    found = Pair{String,Vector{Int}}[]
    for (i, spec) in enumerate(dynamics.specs), (name, _) in parameter_lengths(spec)
        size = name === :weight ? [spec.outputs, spec.inputs] : name === :time_weight ? [spec.outputs, 1] : [spec.outputs]
        push!(found, "layers.$(i - 1).$name" => size)
    end
    return found
end

function layout(d::PotentialNetwork)
    found, n = Pair{String,Vector{Int}}[], inputs(d)
    for i in 1:(d.depth)
        append!(found, ["layers.$(i - 1).weight" => [d.width, i == 1 ? n : d.width], "layers.$(i - 1).bias" => [d.width]])
    end
    return append!(found, ["w" => [d.width], "A" => [d.rank, n], "b" => [n]])
end

layout(d::Dynamics) = throw(ArgumentError("$(nameof(typeof(d))) cannot be described in a file: expected MLP or PotentialNetwork"))

function tensor(tensors, name, size)
    haskey(tensors, name) || throw(ArgumentError("the file has no $name"))
    tensors[name].size == size || throw(ArgumentError("$name has sizes $(tensors[name].size): expected $size"))
    return tensors[name].values
end

"The transforms of the data that a file holds, in order; `unlike` says of what flow they are where they are not known here."
function transforms_of(tensors, dim, unlike)
    left = Set(name for name in keys(tensors) if startswith(name, "transform.") || startswith(name, "context_transform."))
    found = Transform[]
    prefix(i) = "transform.transforms.$i."
    has(i, name) = prefix(i) * name in left
    function take(i, name, size=[dim])
        delete!(left, prefix(i) * name)
        return Float64.(tensor(tensors, prefix(i) * name, size))
    end
    i = 0
    while any(startswith(prefix(i)), left)
        if has(i, "mean")
            mean, std, rotation, scale = take(i, "mean"), take(i, "std"), nothing, ones(dim)
            if has(i + 1, "rotation")
                i += 1
                rotation, scale = permutedims(reshape(take(i, "rotation", [dim, dim]), dim, dim)), take(i, "scale")
            end
            push!(found, Affine(mean, std, rotation, scale))
        elseif has(i, "curvature")
            push!(found, Radial(only(take(i, "scale", Int[])), only(take(i, "curvature", Int[]))))
        elseif has(i, "soft_low")
            push!(found, Edges((take(i, name) for name in ("low", "high", "width", "soft_low", "soft_high"))...))
        else
            break
        end
        i += 1
    end
    isempty(left) || unlike("with a transform of its data that is not known here ($(first(sort!(collect(left)))))")
    return found
end

"What Python's `flow.standardize` is of these transforms, and their tensors by name."
function description_of(transforms::AbstractVector{<:Transform}, dim)
    kinds = Tuple(nameof.(typeof.(transforms)))
    turned = any(t -> t isa Affine && t.rotation !== nothing, transforms)
    name = kinds == () ? "none" : kinds == (:Affine,) ? (turned ? "whiten" : "scale") :
        kinds == (:Affine, :Radial) && turned ? "radial" : kinds == (:Edges, :Affine, :Radial) && turned ? "auto" :
        throw(ArgumentError("transforms $(join(kinds, ", ")) cannot be described in a file"))
    tensors, i = Dict{String,FileTensor}(), 0
    put(name, size, values) = (tensors["transform.transforms.$i.$name"] = FileTensor(size, values))
    for t in transforms
        if t isa Affine
            put("mean", [dim], t.mean), put("std", [dim], t.std)
            if t.rotation !== nothing
                i += 1
                put("rotation", [dim, dim], vec(permutedims(t.rotation))), put("scale", [dim], t.scale)
            end
        elseif t isa Radial
            put("scale", Int[], [t.scale]), put("curvature", Int[], [t.curvature])
        else
            foreach(name -> put(String(name), [dim], getfield(t, name)), fieldnames(Edges))
        end
        i += 1
    end
    return name, tensors
end

"""
    save_flow(path, d::RNODEDistribution)

Writes a flow to a `.safetensors` file, whole or not at all, which `pyrnode.load` and [`load_flow`](@ref) read. The solver is kept by name, with its
tolerances, step and settings. Throws `ArgumentError` for dynamics other than `MLP` and `PotentialNetwork`, and for blocks that differ.
"""
function save_flow(path::AbstractString, d::RNODEDistribution)
    layer = first(d.layers)
    allequal((layout(l.model), description_of(l.model), l.tspan) for l in d.layers) || throw(ArgumentError("blocks that differ cannot be described in a file"))
    first(layer.tspan) == 0 || throw(ArgumentError("tspan = $(layer.tspan): a file has blocks that begin at 0"))
    tensors = Dict{String,FileTensor}()
    for (i, θ) in enumerate(d.θ)
        start = 0
        for (name, size) in layout(layer.model)
            tensors["parts.$(i - 1).dynamics.$name"] = FileTensor(size, θ[(start + 1):(start + prod(size))])
            start += prod(size)
        end
    end
    merge!(tensors, last(description_of(d.transforms, length(d))))
    write_file(path, tensors, description_of(d))
    return path
end

function description_of(d::RNODEDistribution)
    layer, T = first(d.layers), type_names(eltype(d))[3]
    settings = Pair{String,Any}[
        "dtype" => T,
        "flow" => Pair{String,Any}[
            "network" => description_of(layer.model), "blocks" => length(d.layers), "end_time" => last(layer.tspan),
            "standardize" => first(description_of(d.transforms, length(d))),
        ],
        "evaluation" => Pair{String,Any}["solver" => description_of(layer.solver)],
    ]
    return Pair{String,Any}[
        "config" => settings, "event_shape" => [length(d)], "levels" => nothing, "context_dim" => 0, "features" => nothing,
        "context_features" => nothing, "data_dtype" => T,
    ]
end

activation_name(d) = lowercase(String(nameof(typeof(d.φ))))

description_of(d::Layered) = Pair{String,Any}[
    "kind" => "mlp", "hidden" => [spec.outputs for spec in d.specs[1:(end - 1)]], "activation" => activation_name(d),
    "time" => String(first(d.specs).time),
]
description_of(d::PotentialNetwork) = Pair{String,Any}[
    "kind" => "potential", "hidden" => fill(d.width, d.depth), "activation" => activation_name(d), "time" => d.timed ? "concat" : "none",
    "rank" => d.rank,
]
description_of(s::Solver) = Pair{String,Any}[
    "name" => s.name, "step_size" => s.step_size, "adaptive" => s.adaptive || Symbol(s.name) in CUSTOMARILY_FIXED, "rtol" => s.rtol, "atol" => s.atol,
    "error_control" => s.control_all ? "all" : "density", "maxiters" => s.maxiters,
]

# --- the bytes ---

"The tensors of a file by name, and its description. Throws where it is damaged, or none of pyrnode's."
function read_file(path)
    bytes = read(path)
    length(bytes) ≥ 8 || throw(ArgumentError("it has $(length(bytes)) bytes"))
    n = ltoh(only(reinterpret(UInt64, bytes[1:8])))
    n ≤ length(bytes) - 8 || throw(ArgumentError("it is truncated"))
    header = read_json(String(bytes[9:(8 + n)]))
    text = header["__metadata__"]["pyrnode"]
    own, data = read_json(text), view(bytes, (9 + n):length(bytes))
    own["format"] == FORMAT || throw(ArgumentError("it has format $(own["format"]), and this version reads $FORMAT"))
    own["kind"] == "flow" || throw(ArgumentError("it holds a $(own["kind"])"))
    tensors = Dict(name => tensor_of(entry, data) for (name, entry) in header if name != "__metadata__")
    place = findfirst("\"description\": ", text)
    digest(tensors, SubString(text, last(place) + 1, prevind(text, lastindex(text)))) == own["sha256"] ||
        throw(ArgumentError("it is damaged: its digest is another"))
    return tensors, own["description"]
end

function tensor_of(entry, data)
    from, to = entry["data_offsets"]
    T, sizes = NUMBERS[entry["dtype"]], Int.(entry["shape"])
    to - from == prod(sizes; init=1) * sizeof(T) || throw(ArgumentError("a tensor of sizes $sizes has $(to - from) bytes"))
    return FileTensor{T}(sizes, ltoh.(collect(reinterpret(T, data[(from + 1):to]))))
end

"The digest that Python takes, of the description's text and the tensors in the order of their names."
function digest(tensors, text)
    context = SHA.SHA2_256_CTX()
    SHA.update!(context, Vector{UInt8}(codeunits(String(text))))
    for name in sort!(collect(keys(tensors)))
        x = tensors[name]
        sizes = length(x.size) == 1 ? "($(only(x.size)),)" : "($(join(x.size, ", ")))"
        SHA.update!(context, Vector{UInt8}(codeunits("$name:$(type_names(eltype(x.values))[1]):$sizes;")))
        SHA.update!(context, collect(reinterpret(UInt8, htol.(x.values))))
    end
    return bytes2hex(SHA.digest!(context))
end

function write_file(path, tensors, description)
    text = write_json(description)
    own = "{\"format\": $FORMAT, \"kind\": \"flow\", \"sha256\": \"$(digest(tensors, text))\", \"description\": $text}"
    entries, offset = Pair{String,Any}["__metadata__" => Pair{String,Any}["pyrnode" => own]], 0
    names = sort!(collect(keys(tensors)); by=name -> (-sizeof(eltype(tensors[name].values)), name))  # the wider numbers first, aligned
    for name in names
        x = tensors[name]
        stop = offset + sizeof(x.values)
        push!(entries, name => Pair{String,Any}["dtype" => type_names(eltype(x.values))[2], "shape" => x.size, "data_offsets" => [offset, stop]])
        offset = stop
    end
    header = write_json(entries)
    header *= " "^mod(-ncodeunits(header), 8)
    part, io = mktemp(dirname(abspath(path)))
    try
        write(io, htol(UInt64(ncodeunits(header))), header)
        foreach(name -> write(io, htol.(tensors[name].values)), names)
        close(io)
        mv(part, path; force=true)
    finally
        isfile(part) && rm(part)
    end
    return nothing
end
