# The little of JSON that a file's header needs: read, and written as Python's `json.dumps` does, since the digest is of that text.

"A JSON text's value: `nothing`, `Bool`, `Int`, `Float64`, `String`, `Vector{Any}` or `Dict{String,Any}`. Throws `ArgumentError`."
function read_json(text::AbstractString)
    reader = JSONReader(text, firstindex(text))
    value = read_value!(reader, 0)
    next!(reader) === nothing || throw(ArgumentError("JSON that goes on after its end"))
    return value
end

mutable struct JSONReader
    const text::String
    at::Int
end

"The next character that is no blank, without taking it; `nothing` at the end."
function next!(reader::JSONReader)
    while reader.at ≤ ncodeunits(reader.text)
        c = reader.text[reader.at]
        c in (' ', '\t', '\n', '\r') || return c
        reader.at += 1
    end
    return nothing
end

function expect!(reader::JSONReader, token::String)
    next!(reader)
    startswith(SubString(reader.text, reader.at), token) || throw(ArgumentError("JSON without a $token at byte $(reader.at)"))
    reader.at += ncodeunits(token)
    return nothing
end

function read_value!(reader::JSONReader, depth::Int)
    depth < 50 || throw(ArgumentError("JSON that is too deep"))
    c = next!(reader)
    c === '{' && return Dict{String,Any}(read_items!(reader, "{", "}", depth))
    c === '[' && return Any[value for value in read_items!(reader, "[", "]", depth)]
    c === '"' && return read_string!(reader)
    for (token, value) in ("true" => true, "false" => false, "null" => nothing)
        startswith(SubString(reader.text, reader.at), token) && return (expect!(reader, token); value)
    end
    found = match(r"^-?\d+(\.\d+)?([eE][+-]?\d+)?", SubString(reader.text, reader.at))
    found === nothing && throw(ArgumentError("JSON with no value at byte $(reader.at)"))
    reader.at += ncodeunits(found.match)
    whole = found[1] === nothing && found[2] === nothing
    return something(whole ? tryparse(Int, found.match) : nothing, parse(Float64, found.match))
end

"The members of an object, as pairs, or of an array."
function read_items!(reader::JSONReader, open, close, depth)
    items = Any[]
    expect!(reader, open)
    next!(reader) === only(close) && return (expect!(reader, close); items)
    while true
        if open == "{"
            key = read_string!(reader)
            expect!(reader, ":")
            push!(items, key => read_value!(reader, depth + 1))
        else
            push!(items, read_value!(reader, depth + 1))
        end
        next!(reader) === only(close) && return (expect!(reader, close); items)
        expect!(reader, ",")
    end
end

const ESCAPES = Dict('"' => '"', '\\' => '\\', '/' => '/', 'b' => '\b', 'f' => '\f', 'n' => '\n', 'r' => '\r', 't' => '\t')

function read_string!(reader::JSONReader)
    expect!(reader, "\"")
    text, out = reader.text, IOBuffer()
    while reader.at ≤ ncodeunits(text)
        c = text[reader.at]
        reader.at = nextind(text, reader.at)
        c == '"' && return String(take!(out))
        if c == '\\'
            reader.at ≤ ncodeunits(text) || break
            c = text[reader.at]
            reader.at = nextind(text, reader.at)
            c = c == 'u' ? read_unicode!(reader) : get(() -> throw(ArgumentError("JSON with an escape \\$c")), ESCAPES, c)
        end
        print(out, c)
    end
    throw(ArgumentError("JSON with a text that has no end"))
end

function read_unicode!(reader::JSONReader)
    unit = read_unit!(reader)
    0xd800 ≤ unit < 0xdc00 || return Char(unit)
    expect!(reader, "\\u")
    return Char(0x10000 + ((unit - 0xd800) << 10) + (read_unit!(reader) - 0xdc00))
end

function read_unit!(reader::JSONReader)
    ends = reader.at + 3
    unit = ends ≤ ncodeunits(reader.text) ? tryparse(UInt32, reader.text[(reader.at):ends]; base=16) : nothing
    unit === nothing && throw(ArgumentError("JSON with a character that has no number"))
    reader.at = ends + 1
    return unit
end

"A value as Python's `json.dumps` writes it; an object is a vector of pairs, whose order is kept, or a dictionary, which has been read."
write_json(::Nothing) = "null"
write_json(x::Union{Bool,Integer}) = string(x)
write_json(x::AbstractFloat) = python_float(Float64(x))
write_json(x::Pair) = "$(write_json(first(x))): $(write_json(last(x)))"
write_json(x::Vector{<:Pair}) = "{$(join(map(write_json, x), ", "))}"
write_json(x::AbstractVector) = "[$(join(map(write_json, x), ", "))]"

function write_json(x::AbstractString)
    out = IOBuffer()
    names = Dict(c => name for (name, c) in ESCAPES if name != '/')
    for c in x
        haskey(names, c) ? print(out, '\\', names[c]) : ' ' ≤ c ≤ '~' ? print(out, c) : write_units(out, UInt32(c))
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
