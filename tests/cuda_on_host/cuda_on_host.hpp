// Just enough of CUDA for g++ to run the kernels of smope/_ext on a CPU, one block after another. Every thread of a
// block is a fibre; a shuffle publishes its operand and yields until all fibres of its warp have published theirs.
// Included ahead of the source (g++ -include), which then needs no CUDA header.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

using cudaStream_t = void*;
using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
namespace smope {
inline float half_to_float(unsigned short bits) { return static_cast<float>(same_bits<_Float16>(bits)); }
inline unsigned short float_to_half(float x) { return same_bits<unsigned short>(static_cast<_Float16>(x)); }
}  // namespace smope

// ------------------------------------------------------------------------------------------------- fibres
struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 thread;
    unsigned number = 0;
    long collectives = 0;  // warp-wide operations reached so far
    long barriers = 0;     // block-wide ones
    bool done = false;
    uint64_t slot[4];      // operands of the last four collectives
};
struct Block {
    std::vector<Fibre> fibres;
    ucontext_t home;
    unsigned current = 0;
    std::function<void()> body;
};
inline Block* block_now;
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline std::vector<float4> dynamic_shared;
inline float4* dynamic_shared_memory() { return dynamic_shared.data(); }

inline Fibre& me() { return block_now->fibres[block_now->current]; }
inline void yield_fibre() {
    const unsigned mine = block_now->current;
    swapcontext(&block_now->fibres[mine].context, &block_now->home);
    threadIdx = block_now->fibres[mine].thread;
}
template <class Ready>
void yield_until(Ready ready) {
    for (long turns = 0; !ready(); ++turns) {
        if (turns > 100000) {
            std::fprintf(stderr, "cuda_on_host: thread %u waits for others for ever\n", block_now->current);
            std::abort();
        }
        yield_fibre();
    }
}
// Publishes `mine`, waits for the warp, and returns the operand of the thread `from` (a lane of this warp).
inline uint64_t exchange(uint64_t mine, unsigned from_lane) {
    Fibre& fibre = me();
    const long turn = fibre.collectives++;
    fibre.slot[turn % 4] = mine;
    const unsigned begin = fibre.number / 32 * 32;
    const unsigned end = std::min<unsigned>(begin + 32, block_now->fibres.size());
    yield_until([&] {
        for (unsigned i = begin; i < end; ++i) {
            if (block_now->fibres[i].collectives > turn) continue;
            if (block_now->fibres[i].done) {
                std::fprintf(stderr, "cuda_on_host: a lane left while its warp shuffles\n");
                std::abort();
            }
            return false;
        }
        return true;
    });
    return block_now->fibres[std::min(begin + from_lane, end - 1)].slot[turn % 4];
}
template <class T>
T shuffle(T x, unsigned from_lane) {
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    bits = exchange(bits, from_lane);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
template <class T>
T __shfl_sync(unsigned, T x, int lane, int width = 32) {
    const unsigned own = me().number % 32;
    return shuffle(x, own / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask, int = 32) {
    return shuffle(x, (me().number % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned delta, int width = 32) {
    const unsigned own = me().number % 32;
    return shuffle(x, own % width >= delta ? own - delta : own);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        votes |= (shuffle<int>(predicate != 0, lane) ? 1u : 0u) << lane;
    return votes;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline void __syncwarp(unsigned = ~0u) { exchange(0, 0); }
inline void __syncthreads() {
    const long turn = me().barriers++;
    yield_until([&] {
        for (const Fibre& other : block_now->fibres)
            if (!other.done && other.barriers <= turn) return false;
        return true;
    });
}
extern "C" inline long cuda_on_host_atomics = 0;  // made so far
template <class T>
T atomicAdd(T* to, T x) {
    ++cuda_on_host_atomics;
    const T before = *to;
    *to = before + x;
    return before;
}

inline void fibre_main() {
    block_now->body();
    me().done = true;
    swapcontext(&me().context, &block_now->home);
}
template <class Kernel, class... Args>
void launch_on_host(Kernel kernel, dim3 grid, dim3 block, size_t shared, Args... args) {
    gridDim = grid, blockDim = block;
    dynamic_shared.assign(shared / sizeof(float4), make_float4(7.f, 7.f, 7.f, 7.f));  // on a GPU it is not cleared
    Block state;
    block_now = &state;
    state.body = [&] { kernel(args...); };
    state.fibres.resize(block.x);
    for (Fibre& fibre : state.fibres) fibre.stack.reset(new char[1 << 16]);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                for (unsigned i = 0; i < block.x; ++i) {
                    Fibre& fibre = state.fibres[i];
                    getcontext(&fibre.context);
                    fibre.context.uc_stack.ss_sp = fibre.stack.get();
                    fibre.context.uc_stack.ss_size = 1 << 16;
                    fibre.context.uc_link = nullptr;
                    fibre.thread = dim3(i);
                    fibre.number = i;
                    fibre.collectives = fibre.barriers = 0;
                    fibre.done = false;
                    makecontext(&fibre.context, fibre_main, 0);
                }
                for (bool running = true; running;) {
                    running = false;
                    for (unsigned i = 0; i < block.x; ++i) {
                        if (state.fibres[i].done) continue;
                        running = true;
                        state.current = i;
                        threadIdx = state.fibres[i].thread;
                        swapcontext(&state.home, &state.fibres[i].context);
                    }
                }
            }
}
#define SMOPE_LAUNCH(kernel, grid, block, shared, stream, ...) \
    launch_on_host(kernel, grid, dim3(block), shared, __VA_ARGS__)
#define SMOPE_DYNAMIC_SHARED(name) float4* name = dynamic_shared_memory()

inline int cudaMemsetAsync(void* to, int byte, size_t count, void*) {
    std::memset(to, byte, count);
    return 0;
}
inline int cudaGetLastError() { return 0; }
inline int cudaGetDevice(int* device) { return *device = 0; }
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline int host_shared_memory = 99 << 10;  // of a block, as on sm_89
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : host_shared_memory;
    return 0;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
    return 0;
}
