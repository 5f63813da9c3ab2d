// Rasterises a batch of scenes: one thread a triangle of a draw in a view, one warp a piece of a large triangle, one
// thread a pixel of the picture. What each of them does is in raster.h.
//
// The nearest surface is found by atomic minima of (depth, draw, face), so that pictures are the same whatever the
// order of the threads, and equal depths go to what was drawn first, as in OpenGL.
#ifndef SMOPE_LAUNCH  // tests define it to run this file on a CPU
#include <cuda_runtime.h>
#define SMOPE_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif
#include "raster.h"

namespace smope_scenes {
namespace {

constexpr int kThreads = 128;
constexpr int kShare = 16;       // blocks that share the triangles of one draw in one view
constexpr int kInline = 64;      // pixels of a bounding box that its thread goes through by itself
constexpr int kPiece = 32;       // side of the squares that larger ones are cut into
constexpr int kQueueBlocks = 2048;

// Pixel (u, v) of a view of a draw is covered at this depth.
__device__ void keep(const Batch& batch, int draw_number, int image, int view, int face, int u, int v, float depth) {
    if (view == 0) {
        const uint64_t id = static_cast<uint64_t>(draw_number % batch.draws_an_image) << kFaceBits | face;
        unsigned long long key = static_cast<uint64_t>(bits_of(depth)) << 32 | id;
        auto* at = reinterpret_cast<unsigned long long*>(batch.nearest) +
                   (static_cast<int64_t>(image) * batch.height + v) * batch.width + u;
        if (key < *at) atomicMin(at, key);  // a stale value read here is only larger
    } else if (view < kTileView) {
        uint32_t* at = batch.light + ((static_cast<int64_t>(image) * kMaps + view - 1) * batch.shadow + v) * batch.shadow + u;
        const uint32_t bits = bits_of(depth > 0.f ? depth : 0.f);  // bits order as numbers do, but for -0
        if (bits < *at) atomicMin(at, bits);
    } else {
        const int slot = static_cast<int>(batch.draws[static_cast<int64_t>(draw_number) * kDrawWords + kMaterial]) - 1;
        batch.tiles[((static_cast<int64_t>(image) * batch.targets + slot) * kTile + v) * kTile + u] = 255;
    }
}

struct Job {  // a triangle with the names of what it belongs to
    int draw, image, view, face;
};

// The pixels of columns u0, u0 + step, ... u1 and rows v0 .. v1.
__device__ void fill(const Batch& batch, const Job& job, const Target& target, const Triangle& triangle, int u0, int u1,
                     int step, int v0, int v1) {
    for (int v = v0; v <= v1; ++v)
        for (int u = u0; u <= u1; u += step) {
            float weight[3];
            if (!weights_at(triangle, u, v, weight)) continue;
            const float depth =
                weight[0] * triangle.depth[0] + weight[1] * triangle.depth[1] + weight[2] * triangle.depth[2];
            if (depth >= target.lowest && depth <= target.highest)
                keep(batch, job.draw, job.image, job.view, job.face, u, v, depth);
        }
}

__device__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ int larger(int a, int b) { return a > b ? a : b; }

__global__ void draw_triangles(const Batch batch) {
    Job job;
    const int share = blockIdx.x % kShare;
    job.view = blockIdx.x / kShare % kViews;
    job.draw = blockIdx.x / (kShare * kViews);
    const float* draw = batch.draws + static_cast<int64_t>(job.draw) * kDrawWords;
    const int material = static_cast<int>(draw[kMaterial]);
    if (material == 0 || (job.view == kTileView && material > batch.targets)) return;
    const Mesh& mesh = job.view == 0 ? batch.fine : batch.coarse;
    const int faces = mesh.range[2 * static_cast<int>(draw[kMesh]) + 1];
    const Target target = target_of(batch, job.view);
    for (job.face = share * kThreads + threadIdx.x; job.face < faces; job.face += kShare * kThreads) {
        const int32_t* index;
        Corner corner[3];
        Triangle triangle;
        job.image = load_triangle(batch, job.draw, job.view, job.face, index, corner);
        if (!set_up(corner, target, triangle)) continue;
        const int u0 = triangle.u0, v0 = triangle.v0, u1 = triangle.u1, v1 = triangle.v1;
        if ((u1 - u0 + 1) * (v1 - v0 + 1) <= kInline) {
            fill(batch, job, target, triangle, u0, u1, 1, v0, v1);
            continue;
        }
        const int left = u0 / kPiece, top = v0 / kPiece;
        const int across = u1 / kPiece - left + 1, pieces = across * (v1 / kPiece - top + 1);
        const unsigned long long first = atomicAdd(batch.queued, static_cast<unsigned long long>(pieces));
        for (int piece = 0; piece < pieces; ++piece) {
            const int column = left + piece % across, line = top + piece / across;
            if (first + piece < static_cast<unsigned long long>(batch.queue_room)) {
                uint32_t* entry = batch.queue + 4 * (first + piece);
                entry[0] = job.draw, entry[1] = job.view, entry[2] = job.face;
                entry[3] = static_cast<uint32_t>(line) << 16 | column;
            } else {  // slow, and never wrong
                fill(batch, job, target, triangle, larger(u0, column * kPiece),
                     smaller(u1, column * kPiece + kPiece - 1), 1, larger(v0, line * kPiece),
                     smaller(v1, line * kPiece + kPiece - 1));
            }
        }
    }
}

// Whether no edge function leaves the whole piece outside.
__device__ bool reaches(const Triangle& triangle, int u0, int v0) {
    for (int i = 0; i < 3; ++i) {
        const double u = triangle.a[i] > 0 ? u0 + kPiece - 1 : u0, v = triangle.b[i] > 0 ? v0 + kPiece - 1 : v0;
        if (triangle.a[i] * u + triangle.b[i] * v + triangle.c[i] < 0) return false;
    }
    return true;
}

__global__ void draw_pieces(const Batch batch) {
    const unsigned long long room = batch.queue_room, queued = *batch.queued;
    const unsigned long long count = queued < room ? queued : room;
    const int lane = threadIdx.x % 32, warps = kThreads / 32;
    for (unsigned long long at = static_cast<unsigned long long>(blockIdx.x) * warps + threadIdx.x / 32; at < count;
         at += static_cast<unsigned long long>(gridDim.x) * warps) {
        const uint32_t* entry = batch.queue + 4 * at;
        Job job = {static_cast<int>(entry[0]), 0, static_cast<int>(entry[1]), static_cast<int>(entry[2])};
        const int u0 = static_cast<int>(entry[3] & 0xffff) * kPiece, v0 = static_cast<int>(entry[3] >> 16) * kPiece;
        const Target target = target_of(batch, job.view);
        const int32_t* index;
        Corner corner[3];
        Triangle triangle;
        job.image = load_triangle(batch, job.draw, job.view, job.face, index, corner);
        if (!set_up(corner, target, triangle) || !reaches(triangle, u0, v0)) continue;
        const int u = u0 + lane;  // a lane a column
        if (u < triangle.u0 || u > triangle.u1) continue;
        fill(batch, job, target, triangle, u, u, 1, larger(v0, triangle.v0),
             smaller(v0 + kPiece - 1, triangle.v1));
    }
}

__global__ void resolve_pixels(const Batch batch) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at < static_cast<int64_t>(batch.images) * batch.height * batch.width) resolve(batch, at);
}

}  // namespace
}  // namespace smope_scenes

// Queues the work of one batch on `stream` of `device`; 0 or a cudaError_t. `size` guards the struct's layout.
extern "C" int smope_raster(const void* description, int64_t size, int device, void* stream) {
    using namespace smope_scenes;
    if (size != static_cast<int64_t>(sizeof(Batch))) return -1;
    const Batch batch = *static_cast<const Batch*>(description);
    const int64_t pixels = static_cast<int64_t>(batch.images) * batch.height * batch.width;
    const int64_t blocks = static_cast<int64_t>(batch.images) * batch.draws_an_image * kViews * kShare;
    if (pixels == 0 || blocks == 0 || blocks > 0x7fffffff) return -2;
    auto* const queue = static_cast<cudaStream_t>(stream);
    int error = static_cast<int>(cudaSetDevice(device));
    if (error != 0) return error;
    cudaGetLastError();  // what another call of this thread left there is not ours to report
    error = static_cast<int>(cudaMemsetAsync(batch.nearest, 0xff, 8 * pixels, queue));
    if (error != 0) return error;
    error = static_cast<int>(cudaMemsetAsync(batch.queued, 0, sizeof(unsigned long long), queue));
    if (error != 0) return error;
    SMOPE_LAUNCH(draw_triangles, static_cast<unsigned>(blocks), kThreads, 0, queue, batch);
    SMOPE_LAUNCH(draw_pieces, kQueueBlocks, kThreads, 0, queue, batch);
    SMOPE_LAUNCH(resolve_pixels, static_cast<unsigned>((pixels + kThreads - 1) / kThreads), kThreads, 0, queue, batch);
    return static_cast<int>(cudaGetLastError());
}

extern "C" const char* smope_raster_error(int error) {
    if (error == -1) return "the library was compiled from other sources";
    if (error == -2) return "the batch is empty or too large";
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}
