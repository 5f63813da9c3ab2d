// Kernels of the recorded pass (smope/inference/kernels.py). It writes after this one line for each kernel, with all
// sizes as template arguments, and compiles the whole by NVRTC: hence no header. A plain C++ compiler takes it too, with
// one thread where a GPU has a warp (WARP = 1), which is how tests run it on a CPU.
#ifdef __CUDACC_RTC__
#define WARP 32
#define DEVICE __device__ __forceinline__
#define THREAD ((long long)blockIdx.x * blockDim.x + threadIdx.x)
DEVICE float warp_sum(float v) {
    for (int other = 16; other > 0; other >>= 1) v += __shfl_xor_sync(0xffffffffu, v, other);
    return v;
}
#else
#include <cmath>
#include <cstring>
#define WARP 1
#define DEVICE inline
#define __global__
#define __launch_bounds__(n)
#define __restrict__
static thread_local long long thread_on_host;
#define THREAD thread_on_host
static float warp_sum(float v) { return v; }
#endif

namespace smope {

// 16-bit numbers as their bits, turned into float and back, to the nearest with ties to even.
struct F32 {
    typedef float Stored;
    static DEVICE float wide(float v) { return v; }
    static DEVICE float narrow(float v) { return v; }
};
struct BF16 {
    typedef unsigned short Stored;
#ifdef __CUDACC_RTC__
    static DEVICE float wide(unsigned short v) { return __uint_as_float((unsigned)v << 16); }
    static DEVICE unsigned short narrow(float v) {
        const unsigned bits = __float_as_uint(v);
        if (v != v) return 0x7fff;
        return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
#else
    static float wide(unsigned short v) {
        const unsigned bits = (unsigned)v << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
    static unsigned short narrow(float v) {
        unsigned bits;
        std::memcpy(&bits, &v, 4);
        if (v != v) return 0x7fff;
        return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
#endif
};
struct F16 {
    typedef unsigned short Stored;
#ifdef __CUDACC_RTC__
    static DEVICE float wide(unsigned short v) {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
        return f;
    }
    static DEVICE unsigned short narrow(float v) {
        unsigned short h;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
        return h;
    }
#else
    static float wide(unsigned short v) {
        _Float16 h;
        std::memcpy(&h, &v, 2);
        return (float)h;
    }
    static unsigned short narrow(float v) {
        const _Float16 h = (_Float16)v;
        unsigned short bits;
        std::memcpy(&bits, &h, 2);
        return bits;
    }
#endif
};

template <class T, int N>  // N numbers that lie together, in as few loads as may be; aligned to their size
struct alignas(sizeof(typename T::Stored) * N < 16 ? sizeof(typename T::Stored) * N : 16) Pack {
    typename T::Stored at[N];
};
template <class T, int N>
DEVICE void load(const typename T::Stored* from, float (&to)[N]) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = T::wide(pack.at[i]);
}
template <class T, int N>
DEVICE void store(typename T::Stored* to, const float (&from)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = T::narrow(from[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Not a number stays one, as in PyTorch; from sm_80 on there are instructions for that.
DEVICE float within(float v, float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(v), "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(result) : "f"(high));
    return result;
#else
    return v < low ? low : (v > high ? high : v);
#endif
}

// ReLU6 of numbers as they are stored: two at a time where the GPU can.
template <class T, int N>
DEVICE void relu6(Pack<T, N>& pack) {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = T::narrow(within(T::wide(pack.at[i]), 0.f, 6.f));
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
DEVICE unsigned relu6_pair(F16, unsigned v) {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(v) : "r"(0u));
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(v) : "r"(0x46004600u));
    return v;
}
DEVICE unsigned relu6_pair(BF16, unsigned v) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(v) : "r"(0u));
    asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(v) : "r"(0x40c040c0u));
    return v;
}
template <class T>
DEVICE void relu6_pairs(Pack<T, 8>& pack) {
    uint4& words = *reinterpret_cast<uint4*>(pack.at);
    words.x = relu6_pair(T(), words.x);
    words.y = relu6_pair(T(), words.y);
    words.z = relu6_pair(T(), words.z);
    words.w = relu6_pair(T(), words.w);
}
DEVICE void relu6(Pack<F16, 8>& pack) { relu6_pairs(pack); }
DEVICE void relu6(Pack<BF16, 8>& pack) { relu6_pairs(pack); }
#endif

}  // namespace smope
