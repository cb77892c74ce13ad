# Memory for what the evaluations of a solve keep for its pullback: megabytes for each training step, and the same for the next.
# Given anew by the system, every page of it would be cleared first, which costs as much as keeping saves.

"Blocks that solves have done with, the last used at the end, on a CPU."
const FREE = Vector{UInt8}[]
const FREE_BYTES = Ref(0)
const FREE_LOCK = ReentrantLock()

"Bytes of them that are held."
const FREE_LIMIT = 256 * 2^20

function borrow(bytes)
    found = lock(FREE_LOCK) do
        i = findlast(block -> bytes ≤ length(block) ≤ 2bytes, FREE)
        i === nothing && return nothing
        FREE_BYTES[] -= length(FREE[i])
        return popat!(FREE, i)
    end
    return found === nothing ? Vector{UInt8}(undef, bytes) : found
end

"Neither the block nor an array in it may be used again by the caller."
function give_back!(block::Vector{UInt8})
    lock(FREE_LOCK) do
        push!(FREE, block)
        FREE_BYTES[] += length(block)
        while FREE_BYTES[] > FREE_LIMIT
            FREE_BYTES[] -= length(popfirst!(FREE))
        end
    end
    return nothing
end

forget_memory!() = lock(() -> (empty!(FREE); FREE_BYTES[] = 0), FREE_LOCK)

"A block from which arrays are taken one after the other. Whoever holds these holds the block."
mutable struct Memory
    const block::Vector{UInt8}
    used::Int
end

"Takes the bytes that arrays would take."
mutable struct Counter
    bytes::Int
end

Counter() = Counter(0)

"Bytes of an array in a block: whole lines of the cache."
lines(like, size) = cld(prod(size) * sizeof(eltype(like)), 64) * 64

"An array like `like`, of this size: on a CPU out of the block, elsewhere of its own."
Base.take!(::Memory, like, size) = similar(like, size)
function Base.take!(memory::Memory, like::Array{T}, size) where {T}
    start = memory.used
    memory.used += lines(like, size)
    memory.used ≤ length(memory.block) || throw(ArgumentError("a block of $(length(memory.block)) bytes is used up"))
    return unsafe_wrap(Array, Ptr{T}(pointer(memory.block, start + 1)), size)
end

function Base.take!(counter::Counter, like, size)
    counter.bytes += lines(like, size)
    return like
end
