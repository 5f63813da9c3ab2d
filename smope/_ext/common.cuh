// Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, eq. 3), softmax and location arithmetic
// inside. No torch header here: nvcc alone compiles it, and the tests run it on the CPU through a small CUDA stand-in.
//
// A group of kLanes neighbouring lanes serves the points of one (query, head), or kSplit groups share them; a lane owns
// 16 bytes of the head's channels. Every lane prepares its share of its group's points once (location, weight, cells)
// and hands them to the group by shuffles.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace smope {

// ---------------------------------------------------------------------------------------------- element types
struct F16 {
    unsigned short bits;
};
struct BF16 {
    unsigned short bits;
};

#ifdef __CUDACC__
__device__ inline float half_to_float(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline unsigned short float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(F16 x) { return half_to_float(x.bits); }
__device__ inline float to_float(BF16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(F16& to, float x) { to.bits = float_to_half(x); }
__device__ inline void assign(BF16& to, float x) {  // round to nearest, ties to even; a NaN stays a NaN
    unsigned bits = __float_as_uint(x);
    to.bits = x != x ? 0x7fff : static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T>
struct Vec16 {  // 16 bytes of T as floats
    static constexpr int kCount = 16 / sizeof(T);
};
__device__ inline void unpack(const uint4& raw, float (&x)[4], float) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack(const uint4& raw, float (&x)[8], BF16) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ inline void unpack(const uint4& raw, float (&x)[8], F16) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = half_to_float(static_cast<unsigned short>(words[i] & 0xffffu));
        x[2 * i + 1] = half_to_float(static_cast<unsigned short>(words[i] >> 16));
    }
}
template <class T, int N>
__device__ inline void store16(T* to, const float (&x)[N]) {  // `to` lies on a 16-byte border
    union {
        uint4 raw;
        T items[N];
    } pack;
#pragma unroll
    for (int i = 0; i < N; ++i) assign(pack.items[i], x[i]);
    *reinterpret_cast<uint4*>(to) = pack.raw;
}
template <class T>
__device__ inline float2 load_pair(const T* from) {
    struct alignas(2 * sizeof(T)) Pair {
        T x, y;
    };
    const Pair pair = *reinterpret_cast<const Pair*>(from);
    return make_float2(to_float(pair.x), to_float(pair.y));
}
// The widest access that every multiple of `bytes` after a 16-byte border allows.
__host__ __device__ constexpr int widest_access(int bytes) { return bytes % 16 == 0 ? 16 : bytes & -bytes; }
// N neighbours; `from` lies a multiple of N elements after a 16-byte border.
template <int N, class T>
__device__ inline void load_run(const T* from, float (&x)[N]) {
    constexpr int kBytes = widest_access(N * sizeof(T)), kCount = kBytes / sizeof(T);
    struct alignas(kBytes) Chunk {
        T items[kCount];
    };
#pragma unroll
    for (int i = 0; i < N / kCount; ++i) {
        const Chunk chunk = reinterpret_cast<const Chunk*>(from)[i];
#pragma unroll
        for (int k = 0; k < kCount; ++k) x[i * kCount + k] = to_float(chunk.items[k]);
    }
}
template <int N, class T>
__device__ inline void store_run(T* to, const float (&x)[N]) {
    constexpr int kBytes = widest_access(N * sizeof(T)), kCount = kBytes / sizeof(T);
    struct alignas(kBytes) Chunk {
        T items[kCount];
    };
#pragma unroll
    for (int i = 0; i < N / kCount; ++i) {
        Chunk chunk;
#pragma unroll
        for (int k = 0; k < kCount; ++k) assign(chunk.items[k], x[i * kCount + k]);
        reinterpret_cast<Chunk*>(to)[i] = chunk;
    }
}
template <class T>
__device__ inline void store_pair(T* to, float x, float y) {
    struct alignas(2 * sizeof(T)) Pair {
        T x, y;
    };
    Pair pair;
    assign(pair.x, x), assign(pair.y, y);
    *reinterpret_cast<Pair*>(to) = pair;
}

// ---------------------------------------------------------------------------------------------- the problem
template <int kLevels>
struct Problem {
    int batch, queries;
    int boxes;                                            // 1: reference is [B, Q, L, 4], else [B, Q, L, 2]
    int height[kLevels], width[kLevels], start[kLevels];  // start: the level's first cell
    long long cells;                                      // of all levels
    const void* value;                                    // [B, S, H, D]
    const float* reference;                               // [B, Q, L, 2 | 4]
    const void* offsets;                                  // [B, Q, H, L, P, 2]
    const void* logits;                                   // [B, Q, H, L, P]
};

__host__ __device__ constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Everything but batch, queries and the levels' sizes is known when a kernel is compiled.
template <class Value_, class Offset_, int kHeads_, int kHead_, int kLevels_, int kPoints_, int kSplit_ = 1>
struct Layout {
    using Value = Value_;
    using Offset = Offset_;
    static constexpr int kHeads = kHeads_, kHead = kHead_, kLevels = kLevels_, kPoints = kPoints_;
    static constexpr int kStride = kHeads * kHead;                 // elements between neighbouring cells
    static constexpr int kVec = Vec16<Value>::kCount;              // channels a lane
    static constexpr int kUsed = kHead / kVec;                     // lanes that own channels
    static constexpr int kLanes = power_of_two_from(kUsed);        // lanes of a group
    static constexpr int kSplit = kSplit_;                         // groups of a (query, head), a power of two
    static constexpr int kTeam = kLanes * kSplit;                  // lanes of a (query, head)
    static constexpr int kSamples = kLevels * kPoints;             // points of a (query, head)
    static constexpr int kEach = ceil_div(kSamples, kSplit);       // points of a group: the next kEach of them
    static constexpr int kShare = ceil_div(kEach, kLanes);         // points that a lane prepares
    static constexpr int kUnrolled = kShare <= 8 ? kShare : 1;     // beyond this, loop rather than blow up the code
    static_assert(kHead % 8 == 0 && kHead <= 128, "head size: a multiple of 8 up to 128");
    static_assert(kTeam <= 32, "a (query, head) stays within a warp");
};

constexpr unsigned kAllLanes = 0xffffffffu;

template <int kLanes>
__device__ inline float group_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}
template <int kLanes>
__device__ inline float group_max(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

// The lane's i-th point: kSamples or more if it has none.
template <class L>
__device__ inline int own_sample(int split, int i, int lane) {
    const int place = i * L::kLanes + lane;
    return place < L::kEach ? split * L::kEach + place : L::kSamples;
}

// Softmax over all points of the (query, head). weight[i] is that of own_sample(i) (zero past the last one).
template <class L>
__device__ inline void softmax(const typename L::Offset* logits, int split, int lane, float (&weight)[L::kShare]) {
    float top = -__int_as_float(0x7f800000);
#pragma unroll L::kUnrolled
    for (int i = 0; i < L::kShare; ++i) {
        const int sample = own_sample<L>(split, i, lane);
        weight[i] = sample < L::kSamples ? to_float(logits[sample]) : -__int_as_float(0x7f800000);
        top = fmaxf(top, weight[i]);
    }
    top = group_max<L::kTeam>(top);
    float sum = 0.f;
#pragma unroll L::kUnrolled
    for (int i = 0; i < L::kShare; ++i) {
        weight[i] = own_sample<L>(split, i, lane) < L::kSamples ? __expf(weight[i] - top) : 0.f;
        sum += weight[i];
    }
    const float scale = 1.f / group_sum<L::kTeam>(sum);
#pragma unroll L::kUnrolled
    for (int i = 0; i < L::kShare; ++i) weight[i] *= scale;
}

// Where a sample lies: in cells of its level, (0, 0) the centre of the first one.
struct Spot {
    float lx, ly;             // within the cell square, 0..1
    int column, row;          // x0, y0: of the corner to the upper left; may lie outside
    int cell;                 // of that corner, counted over all levels
    unsigned corners;         // bit 0: (x0, y0) is in the level, 1: (x1, y0), 2: (x0, y1), 3: (x1, y1)
    float scale_x, scale_y;   // cells a unit of offset
};

template <class L>
__device__ inline Spot locate(const Problem<L::kLevels>& p, long long query, int level, float2 offset) {
    const int w = p.width[level], h = p.height[level];
    Spot spot;
    float x, y;
    if (p.boxes) {
        const float* box = p.reference + (query * L::kLevels + level) * 4;
        spot.scale_x = box[2] * (0.5f / L::kPoints) * w;
        spot.scale_y = box[3] * (0.5f / L::kPoints) * h;
        // No product is left for the compiler to fuse or not: gather.cuh counts corners and places them with two copies
        // of this code, and an odd one out would leave an entry that nobody wrote.
        x = fmaf(box[0], w, fmaf(offset.x, spot.scale_x, -0.5f));
        y = fmaf(box[1], h, fmaf(offset.y, spot.scale_y, -0.5f));
    } else {
        const float* point = p.reference + (query * L::kLevels + level) * 2;
        spot.scale_x = spot.scale_y = 1.f;
        x = fmaf(point[0], w, offset.x - 0.5f);  // rounded once at the size of x
        y = fmaf(point[1], h, offset.y - 0.5f);
    }
    spot.corners = 0;
    spot.lx = spot.ly = 0.f;
    spot.column = spot.row = spot.cell = 0;
    if (x > -1.f && x < w && y > -1.f && y < h) {  // false for NaN, too
        const float x0 = floorf(x), y0 = floorf(y);
        spot.column = static_cast<int>(x0);
        spot.row = static_cast<int>(y0);
        spot.lx = x - x0;
        spot.ly = y - y0;
        spot.cell = p.start[level] + spot.row * w + spot.column;
        const unsigned columns = (spot.column >= 0 ? 5u : 0u) | (spot.column + 1 < w ? 10u : 0u);
        const unsigned rows = (spot.row >= 0 ? 3u : 0u) | (spot.row + 1 < h ? 12u : 0u);
        spot.corners = columns & rows;
    }
    return spot;
}

}  // namespace smope
