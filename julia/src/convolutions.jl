# Convolutions on a CPU. An image's planes are copied into planes with a border of zeros. A tap moves such a plane by a constant number
# of places, if one lets rows run on into the border, so that a convolution is a product of matrices, (places, taps × in) by
# (taps × in, out), of which the first is never written down. The places in the border are computed too, and left.

"A convolution (W, H, in, batch) to (W, H, out, batch) in our own loops; see [`Conv`](@ref) for its weight."
struct DirectConv{T<:BlasReal,K}
    weight::Array{T,4}
    gradient::Array{T,4}
    turned::Array{T,4}    # the transpose as a convolution
    plane::Int            # length of a plane with its border
    places::Int           # of the output, rows and the border between them: whole tiles
    taps::Vector{Int}     # bytes from the first tap of the first channel to every one
    bordered::Vector{T}   # one image
    spread::Vector{T}     # one result, or one cotangent: planes of `places`
end

function DirectConv(weight::Array{T,4}, gradient::Array{T,4}, (width, height)) where {T}
    side, channels = size(weight, 1), max(size(weight, 3), size(weight, 4))
    row = width + side - 1
    places = cld((height - 1) * row + width, 2lane_count(T)) * 2lane_count(T)
    plane = places + (side - 1) * (row + 1)  # the last tile's last tap
    taps = [sizeof(T) * (i + j * row + c * plane) for i in 0:(side - 1), j in 0:(side - 1), c in 0:(channels - 1)]
    return DirectConv{T,side}(
        weight, gradient, turn(weight), plane, places, vec(taps), zeros(T, plane * channels), zeros(T, places * channels),
    )
end

apply!(y, l::DirectConv, h) = convolve!(y, l, l.weight, h)
transpose!(x, l::DirectConv, g) = convolve!(x, l, l.turned, g)

function convolve!(y::Array{T,4}, l::DirectConv{T}, w::Array{T,4}, x::Array{T,4}) where {T}
    width, height, inputs, batch = size(x)
    side, outputs = size(w, 1), size(w, 4)
    size(w, 3) == inputs && size(y) == (width, height, outputs, batch) && fits(l, x) ||
        throw(DimensionMismatch("a convolution by $(size(w)) of $(size(x)) into $(size(y))"))
    inner = side^2 * inputs
    GC.@preserve y l w x for b in 1:batch
        border!(l, x, b)
        for q in 0:(2lane_count(T)):(l.places - 1)
            tiles!(
                Val(2), pointer(l.spread, q + 1), l.places, pointer(l.bordered, q + 1), pointer(l.taps), pointer(w), 1, inner, inner,
                outputs, one(T), Val(false),
            )
        end
        each_row(y, b) do at, row, channel
            copyto!(y, at, l.spread, channel * l.places + row * (width + side - 1) + 1, width)
        end
    end
    return y
end

"∂w: each tap's product of the moved planes with the cotangent's, whose border is zero."
function accumulate!(l::DirectConv{T,K}, h::Array{T,4}, g::Array{T,4}, α) where {T,K}
    _, _, inputs, outputs = size(l.gradient)
    fits(l, h) && size(h, 3) == inputs && size(g) == (size(h, 1), size(h, 2), outputs, size(h, 4)) ||
        throw(DimensionMismatch("a gradient of $(size(l.gradient)) from $(size(h)) and $(size(g))"))
    width = size(h, 1)
    GC.@preserve l h g for b in axes(h, 4)
        border!(l, h, b)
        fill!(l.spread, false)
        each_row(g, b) do at, row, channel
            copyto!(l.spread, 1 + channel * l.places + row * (width + K - 1), g, at, width)
        end
        o = 0
        while o < outputs
            n = outputs - o ≥ 4 && K ≤ 3 ? 4 : outputs - o ≥ 2 && K ≤ 6 ? 2 : 1  # as many sums as there are registers for
            for c in 0:(inputs - 1), j in 0:(K - 1)
                to = pointer(l.gradient, 1 + K * (j + K * (c + inputs * o)))
                from, by = pointer(l.bordered, 1 + c * l.plane + j * (width + K - 1)), pointer(l.spread, 1 + o * l.places)
                n == 4 ? moved_products!(Val(K), Val(4), to, K^2 * inputs, from, by, l.places, T(α)) :
                n == 2 ? moved_products!(Val(K), Val(2), to, K^2 * inputs, from, by, l.places, T(α)) :
                moved_products!(Val(K), Val(1), to, K^2 * inputs, from, by, l.places, T(α))
            end
            o += n
        end
    end
    return l.gradient
end

fits(l::DirectConv, x) = (size(x, 2) - 1) * (size(x, 1) + size(l.weight, 1) - 1) + size(x, 1) ≤ l.places && size(x, 3) * l.plane ≤ length(l.bordered)

"Calls `work(start, row, channel)` for every row of image `b`: where it begins, and its numbers from 0."
function each_row(work, x, b)
    width, height, channels, _ = size(x)
    for channel in 0:(channels - 1), row in 0:(height - 1)
        work(1 + width * (row + height * (channel + channels * (b - 1))), row, channel)
    end
    return nothing
end

function border!(l::DirectConv, x, b)
    width, edge = size(x, 1), size(l.weight, 1) ÷ 2
    each_row(x, b) do at, row, channel
        copyto!(l.bordered, 1 + channel * l.plane + (row + edge) * (width + 2edge) + edge, x, at, width)
    end
    return nothing
end

"w[i, j] ← w[i, j] + α Σ_q h[q + i] g[q, j] for a row of `K` taps and `N` outputs, which are `across` numbers apart."
@generated function moved_products!(::Val{K}, ::Val{N}, w::Ptr{T}, across, h::Ptr{T}, g::Ptr{T}, places, α) where {K,N,T}
    once = Expr(:loopinfo, (Symbol("llvm.loop.unroll.disable"),))
    return quote
        Base.Cartesian.@nexprs $N j -> Base.Cartesian.@nexprs $K i -> s_i_j = all_lanes(zero(T))
        for q in 0:$VECTOR_BYTES:(places * sizeof(T) - 1)
            Base.Cartesian.@nexprs $K i -> h_i = load_lanes(h + q + (i - 1) * sizeof(T))
            Base.Cartesian.@nexprs $N j -> begin
                x = load_lanes(g + q + (j - 1) * places * sizeof(T))
                Base.Cartesian.@nexprs $K i -> s_i_j = multiply_add(h_i, x, s_i_j)
            end
            $once
        end
        Base.Cartesian.@nexprs $N j -> Base.Cartesian.@nexprs $K i -> begin
            n = (j - 1) * across + i
            unsafe_store!(w, muladd(α, lane_sum(s_i_j), unsafe_load(w, n)), n)
        end
        return nothing
    end
end
