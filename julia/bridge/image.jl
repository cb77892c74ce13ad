# Builds the system image, for `pyrnode install-julia` (pyrnode/julia_image.py):
#
#     julia --startup-file=no image.jl TOOLS PROJECT STATEMENTS IMAGE
#
# TOOLS is an environment of PackageCompiler's own, made if need be; PROJECT the folder of the engine's packages, which stays as it
# is; STATEMENTS a file of what a process of the engine's compiled; IMAGE the file to write. The image has the packages that RNODE and
# RNODEBridge need, at the versions of PROJECT's Manifest, and no others.

import Pkg, TOML

const PACKAGE_COMPILER = (name="PackageCompiler", uuid="9b87118b-4619-50d2-8e1e-99f35a4d4d9d", version="2")

const BRIDGE = @__DIR__
const SOURCES = dirname(BRIDGE)

"The first of the files that is there, as Julia looks for it."
function read_toml(folder, stems...)
    names = [stem * mark * ".toml" for mark in ("-v$(VERSION.major).$(VERSION.minor)", "") for stem in stems]
    i = findfirst(name -> isfile(joinpath(folder, name)), names)
    return i === nothing ? error("$folder holds no $(last(names))") : TOML.parsefile(joinpath(folder, names[i]))
end

names_of(deps) = deps isa AbstractDict ? collect(keys(deps)) : deps

"The entries of a Manifest that are needed for `names`, with what they need themselves."
function needed(entries, names)
    found, todo = Dict{String,Any}(), collect(names)
    while !isempty(todo)
        name = pop!(todo)
        (haskey(found, name) || !haskey(entries, name)) && continue
        found[name] = entries[name]
        foreach(entry -> append!(todo, names_of(get(entry, "deps", String[]))), found[name])
    end
    return found
end

"A package in a folder of its own, as a Manifest has it."
function developed(folder)
    project = TOML.parsefile(joinpath(folder, "Project.toml"))
    entry = Dict("uuid" => project["uuid"], "version" => project["version"], "path" => folder, "deps" => sort!(collect(keys(project["deps"]))))
    return project["name"] => [entry]
end

"An environment with the two packages beside what they need of PROJECT, at its versions and with its preferences."
function image_project(folder, project)
    manifest = read_toml(project, "JuliaManifest", "Manifest")
    table = read_toml(project, "JuliaProject", "Project")
    own = Dict(developed(SOURCES), developed(BRIDGE))
    entries = needed(manifest["deps"], [name for (entry,) in values(own) for name in entry["deps"]])
    for list in values(entries), entry in list
        haskey(entry, "path") && (entry["path"] = normpath(joinpath(project, entry["path"])))
        weak = get(entry, "weakdeps", nothing)  # by name alone only where the Manifest has them
        weak isa Vector && (entry["weakdeps"] = Dict(name => manifest["deps"][name][1]["uuid"] for name in weak))
    end
    merge!(entries, own)
    deps = Dict{String,Any}(name => uuid for (name, uuid) in table["deps"] if haskey(entries, name))
    merge!(deps, Dict(name => list[1]["uuid"] for (name, list) in own))
    extras = filter(pair -> !haskey(deps, first(pair)), merge(table["deps"], get(table, "extras", Dict{String,Any}())))
    written = Dict("deps" => deps, "extras" => extras, "preferences" => get(table, "preferences", Dict{String,Any}()))
    open(io -> TOML.print(io, filter(pair -> !isempty(last(pair)), written); sorted=true), joinpath(folder, "Project.toml"), "w")
    kept = Dict("julia_version" => string(VERSION), "manifest_format" => "2.0", "deps" => entries)
    open(io -> TOML.print(io, kept; sorted=true), joinpath(folder, "Manifest.toml"), "w")
    for name in ("LocalPreferences.toml", "JuliaLocalPreferences.toml")
        isfile(joinpath(project, name)) && cp(joinpath(project, name), joinpath(folder, name))
    end
    return folder
end

const TOOLS, PROJECT, STATEMENTS, IMAGE = ARGS

Pkg.activate(TOOLS; io=devnull)
haskey(Pkg.project().dependencies, PACKAGE_COMPILER.name) || Pkg.add(; PACKAGE_COMPILER...)
import PackageCompiler

# RNODEBridge loads all that it needs, in the order that it must have (`RNODEBridge.Embedding`): so not its dependencies one by one.
PackageCompiler.create_sysimage(
    ["RNODEBridge"]; sysimage_path=IMAGE, project=image_project(mktempdir(), PROJECT), precompile_statements_file=STATEMENTS,
    include_transitive_dependencies=false,
)
