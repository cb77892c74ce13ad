# What files say of themselves: JSON.jl reads it. It is written as Python's `json.dumps` does, since the digest is of that text, and JSON.jl
# knows neither Python's numbers nor its blanks.

"A JSON text's value, its objects as dictionaries; of a text that is none JSON.jl throws one thing or another."
read_json(text::AbstractString) = JSON.parse(text; dicttype=Dict{String,Any})

const ESCAPES = Dict('"' => '"', '\\' => '\\', '\b' => 'b', '\f' => 'f', '\n' => 'n', '\r' => 'r', '\t' => 't')

"A value as Python's `json.dumps` writes it; an object is a vector of pairs, whose order is kept."
write_json(::Nothing) = "null"
write_json(x::Union{Bool,Integer}) = string(x)
write_json(x::AbstractFloat) = python_float(Float64(x))
write_json(x::Pair) = "$(write_json(first(x))): $(write_json(last(x)))"
write_json(x::Vector{<:Pair}) = "{$(join(map(write_json, x), ", "))}"
write_json(x::AbstractVector) = "[$(join(map(write_json, x), ", "))]"

function write_json(x::AbstractString)
    out = IOBuffer()
    for c in x
        haskey(ESCAPES, c) ? print(out, '\\', ESCAPES[c]) : ' ' ≤ c ≤ '~' ? print(out, c) : write_units(out, UInt32(c))
    end
    return "\"$(String(take!(out)))\""
end

unit_text(unit) = "\\u" * string(unit; base=16, pad=4)
write_units(out, c) =
    c < 0x10000 ? print(out, unit_text(c)) :
    print(out, unit_text(0xd800 + ((c - 0x10000) >> 10)), unit_text(0xdc00 + ((c - 0x10000) & 0x3ff)))

"A number as Python's `repr` writes it: the same shortest digits as Julia's, with another rule for exponents."
function python_float(x::Float64)
    isfinite(x) || throw(ArgumentError("$x: expected a finite number"))
    x == 0 && return signbit(x) ? "-0.0" : "0.0"
    found = match(r"^(-?)(\d+)\.(\d+)(?:e(-?\d+))?$", repr(x))
    sign, whole, part = found[1], found[2], found[3] == "0" ? "" : found[3]
    digits = whole * part
    exponent = length(whole) - 1 + (found[4] === nothing ? 0 : parse(Int, found[4]))
    zeros = something(findfirst(!=('0'), digits), 1) - 1
    digits, exponent = rstrip(digits[(zeros + 1):end], '0'), exponent - zeros
    n = length(digits)
    if !(-4 ≤ exponent < 16)
        mantissa = n == 1 ? digits : digits[1:1] * "." * digits[2:end]
        return "$sign$(mantissa)e$(exponent < 0 ? '-' : '+')$(lpad(abs(exponent), 2, '0'))"
    end
    exponent < 0 && return "$(sign)0.$("0"^(-exponent - 1))$digits"
    n ≤ exponent + 1 && return "$sign$digits$("0"^(exponent + 1 - n)).0"
    return "$sign$(digits[1:(exponent + 1)]).$(digits[(exponent + 2):end])"
end
