# Stands for RNODEBridgeCUDA.jl where there is no GPU: memory that torch says is CUDA's becomes arrays that forbid what a GPU cannot do,
# one number at a time, over that same memory. Counts what the host reads of them, and how often one side waits for the other.
module Crossing

using DLPack: DLPack
using JLArrays: JLArray, JLArrays
using NNlib: NNlib
using RNODEBridge: RNODEBridge

JLArrays.allowscalar(false)

const COUNTS = Dict("reads" => 0, "waits" => 0, "wrapped" => 0)

function RNODEBridge.wrapped(::Val{Int(DLPack.kDLCUDA)}, ::Type{T}, place, shape::Dims{N}, number) where {T,N}
    COUNTS["wrapped"] += 1
    memory = unsafe_wrap(Array, Ptr{UInt8}(place), prod(shape) * sizeof(T))
    return JLArray{T,N}(JLArrays.DataRef(_ -> nothing, memory), shape)
end

RNODEBridge.synchronize(x::JLArrays.AnyJLArray) = (COUNTS["waits"] += 1; nothing)

# All that is read goes through this one, single numbers too; the body is JLArrays' own.
function Base.copyto!(dest::Array{T}, d_offset::Integer, source::JLArrays.DenseJLArray{T}, s_offset::Integer, amount::Integer) where {T}
    amount == 0 && return dest
    COUNTS["reads"] += 1
    GC.@preserve dest source Base.unsafe_copyto!(pointer(dest, d_offset), pointer(source, s_offset), amount)
    return dest
end

function NNlib._batched_gemm!(::Type{<:JLArray}, tA::Char, tB::Char, α, A, B, β, C)  # CUDA has its own
    reads, out = COUNTS["reads"], Array(C)
    NNlib._batched_gemm!(typeof(out), tA, tB, α, Array(A), Array(B), β, out)
    COUNTS["reads"] = reads
    return copyto!(C, out)
end

"The counts since the last time, as reads, waits, wrapped."
function counts()
    found = map(name -> COUNTS[name], ("reads", "waits", "wrapped"))
    foreach(name -> COUNTS[name] = 0, keys(COUNTS))
    return found
end

end
