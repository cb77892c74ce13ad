"""
The bridge on an NVIDIA GPU: torch's memory as CUDA.jl's arrays, and the wait where one side takes over from the other. Loaded where LuxCUDA is
installed and torch has a GPU. **Never run**: no GPU was there. The same code on an array type that stands for a GPU's is tested (tests/julia/crossing.jl).
"""
module RNODEBridgeCUDA

__precompile__(false)

using LuxCUDA: LuxCUDA  # and with it what Lux, NNlib and MLDataDevices do on CUDA
using CUDA: CUDA, CuArray, CuPtr
using DLPack: DLPack
using RNODEBridge: RNODEBridge

"Torch's allocator owns it: it is wrapped, and never freed, in the context of the device that it lies on."
function RNODEBridge.wrapped(::Val{Int(DLPack.kDLCUDA)}, ::Type{T}, place, shape, number) where {T}
    CUDA.deviceid() == number || CUDA.device!(number)
    return unsafe_wrap(CuArray, CuPtr{T}(place), shape; own=false)
end

"The stream of this task, on which all that it queued runs in order."
RNODEBridge.synchronize(::CUDA.AnyCuArray) = CUDA.synchronize(CUDA.stream())

end
