# Options of solvers: what there is, and what each takes. Whoever gives a wrong one is told by name, before anything is solved.

"What an option takes: in words, whether a value is that, and the value as the algorithm wants it."
struct Kind
    words::String
    fits::Any
    convert::Any
end
Kind(words, fits) = Kind(words, fits, identity)

real_number(x) = x isa Real && !(x isa Bool) && isfinite(x)
several(fits) = x -> fits(x) || (x isa Union{AbstractVector,Tuple} && all(fits, x))

const TRUTH = Kind("true or false", x -> x isa Bool)
const NUMBER = Kind("a number", real_number)
const POSITIVE = Kind("a positive number", x -> real_number(x) && x > 0)
const NOT_NEGATIVE = Kind("a number that is not negative", x -> real_number(x) && x ≥ 0)
const WHOLE = Kind("a whole number", x -> x isa Integer && !(x isa Bool))
const TIMES = Kind("a time, or a list of times", several(real_number))
const OBJECT = Kind(
    "an object of Julia's, which can be given in Julia alone", x -> !(x isa Union{Real,AbstractString,AbstractVector,Symbol}),
)
const ANYTHING = Kind("what it takes", x -> true)

choice(names...) = Kind(
    "one of $(join(repr.(String.(names)), ", "))", x -> x isa Union{Symbol,AbstractString} && Symbol(x) in names, Symbol,
)

"Keywords of SciML's `solve` that may be given among a solver's options."
const SOLVE_OPTIONS = Dict(
    :adaptive => TRUTH, :beta1 => NUMBER, :beta2 => NUMBER, :controller => OBJECT, :dense => TRUTH, :dtmax => POSITIVE,
    :dtmin => NOT_NEGATIVE, :failfactor => POSITIVE, :force_dtmin => TRUTH, :gamma => POSITIVE, :internalnorm => OBJECT,
    :qmax => POSITIVE, :qmin => POSITIVE, :qoldinit => POSITIVE, :qsteady_max => POSITIVE, :qsteady_min => POSITIVE,
    :save_everystep => TRUTH, :save_start => TRUTH, :saveat => TIMES, :tstops => TIMES,
)

"Those of them that say which states `path` keeps; in a solve with a pullback its sensitivity algorithm decides."
const SAVING = (:dense, :save_everystep, :save_start, :saveat)

"SciML's names of what are settings of a solver here."
const SETTINGS = Dict(:abstol => "atol", :reltol => "rtol", :dt => "step_size", :alg => "name", :callback => nothing)

"Options of algorithms whose default values do not say what they take."
const PARTICULAR = Dict(
    :autodiff => OBJECT, :linsolve => OBJECT, :nlsolve => OBJECT, :precs => OBJECT, :step_limiter! => OBJECT,
    :stage_limiter! => OBJECT, :eigen_est => OBJECT, :standardtag => OBJECT, :diff_type => OBJECT, :chunk_size => OBJECT,
    :thread => OBJECT, :concrete_jac => TRUTH, :order => WHOLE, :κ => POSITIVE, :tol => POSITIVE,
    :controller => choice(:PI, :Predictive, :Standard), :extrapolant => choice(:constant, :linear, :dense),
    :kappa => Kind("a number, or a list of them", several(real_number), x -> x isa AbstractVector ? Tuple(x) : x),
)

"What an option takes, by the value that it has when it is not given."
kind_of(name::Symbol, default) = get(() -> kind_of(default), PARTICULAR, name)
kind_of(::Bool) = TRUTH
kind_of(::Integer) = WHOLE
kind_of(::Real) = NUMBER
kind_of(::Val{true}) = TRUTH
kind_of(::Val{false}) = TRUTH
kind_of(::Val{N}) where {N} = Kind("a whole number from 1 to $N", x -> x isa Integer && !(x isa Bool) && 1 ≤ x ≤ N, Val)
kind_of(default) = ANYTHING

"The general options among those given, as SciML takes them, but for those of the algorithm's own (`own`); throws `ArgumentError` for wrong ones."
function general_options(name, own, given)
    for key in keys(given)
        haskey(SETTINGS, key) || continue
        remedy = SETTINGS[key] === nothing ? "RNODE has none" : "give it as the solver's $(SETTINGS[key])"
        throw(ArgumentError("$key is no option of $name: $remedy"))
    end
    found = Dict{Symbol,Any}(k => value(name, k, v, SOLVE_OPTIONS[k]) for (k, v) in given if is_general(k, own))
    least, most = get(found, :dtmin, 0), get(found, :dtmax, Inf)
    least ≤ most || throw(ArgumentError("dtmin = $least, dtmax = $most: the smallest step is longer than the longest"))
    return found
end

is_general(key, own) = haskey(SOLVE_OPTIONS, key) && !(String(key) in own)

function value(name, key, given, kind::Kind)
    kind.fits(given) && return kind.convert(given)
    throw(ArgumentError("option $key = $(repr(given)) of $name: expected $(kind.words)"))
end

"The options of the algorithm `name`, whose names are `known`, as it takes them; `bare` is the algorithm without."
function particular_options(name, known, given, bare)
    found = Dict{Symbol,Any}()
    for (key, v) in given
        String(key) in known || throw(ArgumentError(
            "$name cannot be made with the options given ($key); its options are $(join(known, ", "))$(isempty(known) ? "" : ", ")" *
            "and of every solver's $(join(sort!(collect(keys(SOLVE_OPTIONS))), ", "))",
        ))
        default = bare !== nothing && hasproperty(bare, key) ? getproperty(bare, key) : missing
        found[key] = value(name, key, v, kind_of(key, default))
    end
    return found
end
