// Just enough of CUDA for g++ to run smope/_ext/raster.cu on a CPU: its threads never wait for each other, so that one
// after another will do. Included ahead of the source (g++ -include), which then needs no CUDA header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__

struct dim3 {
    unsigned x;
};
inline thread_local dim3 threadIdx, blockIdx, gridDim;  // several threads may draw at once
using cudaStream_t = void*;
using cudaError_t = int;

template <class T>
T atomicMin(T* at, T value) {
    const T before = *at;
    if (value < before) *at = value;
    return before;
}
template <class T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at = before + value;
    return before;
}

template <class Kernel, class... Args>
void launch_on_host(Kernel kernel, unsigned grid, unsigned block, Args... args) {
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) kernel(args...);
}
#define SMOPE_LAUNCH(kernel, grid, block, shared, stream, ...) launch_on_host(kernel, grid, block, __VA_ARGS__)

inline int cudaSetDevice(int) { return 0; }
inline int cudaMemsetAsync(void* to, int byte, size_t count, void*) {
    std::memset(to, byte, count);
    return 0;
}
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return "no error"; }
