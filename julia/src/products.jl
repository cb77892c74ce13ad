# Products of matrices as small as those of a multilayer perceptron, 64 by 64 by a piece of the batch. A tile of two vectors by
# six columns stays in registers; nothing is packed or chosen first, for which BLAS takes a third of its time at this size.

using Base.BinaryPlatforms: CPUID

"Bytes of the processor's vectors; where it has shorter ones, the compiler takes two for one."
const VECTOR_BYTES = Sys.ARCH === :x86_64 && CPUID.test_cpu_feature(CPUID.JL_X86_avx512f) ? 64 : 32

"Columns of a tile of two vectors of rows; of one vector, as many again."
const TILE = 6

"Numbers of type `T` in a vector."
lane_count(::Type{T}) where {T} = VECTOR_BYTES ÷ sizeof(T)

"`n` rounded up to whole vectors."
padded(::Type{T}, n) where {T} = cld(n, lane_count(T)) * lane_count(T)

const Lanes{N,T} = NTuple{N,VecElement{T}}

for (T, letter) in ((Float32, "f32"), (Float64, "f64"))
    V, intrinsic = Lanes{lane_count(T),T}, "llvm.fmuladd.v$(lane_count(T))$letter"
    @eval @inline multiply_add(a::$V, b::$V, c::$V) = ccall($intrinsic, llvmcall, $V, ($V, $V, $V), a, b, c)
end

@inline all_lanes(x::T) where {T} = ntuple(_ -> VecElement(x), Val(lane_count(T)))
@inline load_lanes(p::Ptr{T}) where {T} = unsafe_load(Ptr{Lanes{lane_count(T),T}}(p))
@inline lane_sum(v::Lanes{N}) where {N} = sum(ntuple(i -> v[i].value, Val(N)))
@inline store_lanes!(p::Ptr{T}, v) where {T} = unsafe_store!(Ptr{Lanes{lane_count(T),T}}(p), v)

"Where column `k` of a begins: all are `lda` apart, or there is a list of their distances in bytes."
@inline column(a::Ptr{T}, lda::Int, k) where {T} = a + k * lda * sizeof(T)
@inline column(a::Ptr, distances::Ptr{Int}, k) = a + unsafe_load(distances, k + 1)

"""
`M` vectors of rows by `N` columns of c ← a b, or c ← c + α a b with `add`. Pointers are to the first numbers; `lda` (or the list that
[`column`](@ref) takes) and `ldc` are from column to column, and b is stepped through by `along` the sum and by `across` columns.
"""
@generated function tile!(
    ::Val{M}, ::Val{N}, c::Ptr{T}, ldc, a::Ptr{T}, lda, b::Ptr{T}, along, across, inner, α, ::Val{Add},
) where {M,N,T,Add}
    step = VECTOR_BYTES
    # Unrolled, the loop would have more vectors under way than there are registers.
    once = Expr(:loopinfo, (Symbol("llvm.loop.unroll.disable"),))
    return quote
        Base.Cartesian.@nexprs $N j -> Base.Cartesian.@nexprs $M i -> c_i_j = all_lanes(zero(T))
        for k in 0:(inner - 1)
            from = column(a, lda, k)
            Base.Cartesian.@nexprs $M i -> a_i = load_lanes(from + (i - 1) * $step)
            Base.Cartesian.@nexprs $N j -> begin
                x = all_lanes(unsafe_load(b + (k * along + (j - 1) * across) * sizeof(T)))
                Base.Cartesian.@nexprs $M i -> c_i_j = multiply_add(a_i, x, c_i_j)
            end
            $once
        end
        Base.Cartesian.@nexprs $N j -> Base.Cartesian.@nexprs $M i -> begin
            place = c + (j - 1) * ldc * sizeof(T) + (i - 1) * $step
            store_lanes!(place, Add ? multiply_add(c_i_j, all_lanes(α), load_lanes(place)) : c_i_j)
        end
        return nothing
    end
end

"Rows of a tile height over all columns, `TILE` of them at a time and then what is left."
function tiles!(height::Val{M}, c::Ptr{T}, ldc, a::Ptr{T}, lda, b::Ptr{T}, along, across, inner, columns, α, add::Val) where {M,T}
    j = 0
    while j < columns
        to, from, n = c + j * ldc * sizeof(T), b + j * across * sizeof(T), min(M == 1 ? 2TILE : TILE, columns - j)
        n = 6 < n < 12 ? 6 : n
        M == 1 && n == 12 ? tile!(height, Val(12), to, ldc, a, lda, from, along, across, inner, α, add) :
        n == 6 ? tile!(height, Val(6), to, ldc, a, lda, from, along, across, inner, α, add) :
        n == 5 ? tile!(height, Val(5), to, ldc, a, lda, from, along, across, inner, α, add) :
        n == 4 ? tile!(height, Val(4), to, ldc, a, lda, from, along, across, inner, α, add) :
        n == 3 ? tile!(height, Val(3), to, ldc, a, lda, from, along, across, inner, α, add) :
        n == 2 ? tile!(height, Val(2), to, ldc, a, lda, from, along, across, inner, α, add) :
        tile!(height, Val(1), to, ldc, a, lda, from, along, across, inner, α, add)
        j += n
    end
    return nothing
end

"""
c (rows, columns) ← a b, or c ← c + α a b with `add`, as in [`tile!`](@ref). In a, a whole vector can be read from where the last
rows begin, or there are enough rows before them. `spare` is the memory of a tile of one vector.
"""
function small_product!(
    c::Ptr{T}, rows, columns, a::Ptr{T}, lda, b::Ptr{T}, along, across, inner, α::T, add::Val, spare::Ptr{T},
) where {T}
    V, i = lane_count(T), 0
    at(p, n) = p + n * sizeof(T)
    while i + 2V ≤ rows
        tiles!(Val(2), at(c, i), rows, at(a, i), lda, b, along, across, inner, columns, α, add)
        i += 2V
    end
    if i + V ≤ rows
        tiles!(Val(1), at(c, i), rows, at(a, i), lda, b, along, across, inner, columns, α, add)
        i += V
    end
    i == rows && return nothing
    start = min(i, lda - V)
    for j in 0:(2TILE):(columns - 1)
        n = min(2TILE, columns - j)
        tiles!(Val(1), spare, V, at(a, start), lda, at(b, j * across), along, across, inner, n, α, Val(false))
        for column in 0:(n - 1), row in i:(rows - 1)
            place, x = row + (j + column) * rows + 1, unsafe_load(spare, row - start + column * V + 1)
            unsafe_store!(c, add === Val(true) ? muladd(α, x, unsafe_load(c, place)) : x, place)
        end
    end
    return nothing
end

"A dense layer's weight (in, out) and what its products need besides."
struct SmallDense{T<:BlasReal}
    weight::Matrix{T}
    gradient::Matrix{T}
    forward::Matrix{T}  # the transpose (out, in), and the weight itself: rows of zeros make them whole vectors
    back::Matrix{T}
    turned::Matrix{T}   # the gradient's transpose, where that has the longer columns
    spare::Vector{T}
end

function SmallDense(weight::Matrix{T}, gradient::Matrix{T}) where {T}
    inputs, outputs = size(weight)
    forward, back = zeros(T, padded(T, outputs), inputs), zeros(T, padded(T, inputs), outputs)
    view(forward, 1:outputs, :) .= transpose(weight)
    view(back, 1:inputs, :) .= weight
    turned = zeros(T, inputs < lane_count(T) ? (outputs, inputs) : (0, 0))
    return SmallDense(weight, gradient, forward, back, turned, zeros(T, lane_count(T) * 2TILE))
end

"Whether the products of a layer of this size are ours: beyond 64 KiB, BLAS is as fast."
is_small(::Type{T}, inputs, outputs) where {T} = lane_count(T) ≤ max(inputs, outputs) && inputs * outputs * sizeof(T) ≤ 2^16

function left_times!(c::Matrix{T}, a::Matrix{T}, b::Matrix{T}, spare) where {T}
    size(b) == (size(a, 2), size(c, 2)) && size(a, 1) == padded(T, size(c, 1)) ||
        throw(DimensionMismatch("a product of $(size(a)) and $(size(b)) into $(size(c))"))
    GC.@preserve a b c spare small_product!(
        pointer(c), size(c)..., pointer(a), size(a, 1), pointer(b), 1, size(b, 1), size(b, 1), one(T), Val(false), pointer(spare),
    )
    return c
end

"c (rows, columns) ← c + α a bᵀ, or c ← a bᵀ without `add`; a has at least as many rows as a vector has numbers."
function outer!(c::Matrix{T}, a::Matrix{T}, b::Matrix{T}, α, add::Val, spare) where {T}
    size(a, 1) == size(c, 1) ≥ lane_count(T) && size(b, 1) == size(c, 2) && size(a, 2) == size(b, 2) ||
        throw(DimensionMismatch("a product of $(size(a)) and the transpose of $(size(b)) into $(size(c))"))
    GC.@preserve a b c spare small_product!(
        pointer(c), size(c)..., pointer(a), size(a, 1), pointer(b), size(b, 1), 1, size(a, 2), T(α), add, pointer(spare),
    )
    return c
end

apply!(y, l::SmallDense, h) = left_times!(y, l.forward, h, l.spare)
transpose!(x, l::SmallDense, g) = left_times!(x, l.back, g, l.spare)

function accumulate!(l::SmallDense, h, g, α)
    isempty(l.turned) && return outer!(l.gradient, h, g, α, Val(true), l.spare)
    outer!(l.turned, g, h, 1, Val(false), l.spare)
    return l.gradient .+= eltype(h)(α) .* transpose(l.turned)
end
