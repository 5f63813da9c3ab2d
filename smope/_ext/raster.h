// Scenes of triangles as pixels: what one thread does for one triangle, one rectangle of pixels and one pixel. No
// torch and no CUDA header is needed, so that the same source also runs on a CPU.
//
// Every view has homogeneous pixel coordinates X = (x, y, w): a point is seen at pixel (x / w, y / w), and whole
// numbers are pixel centres. The line of sight through (u, v) meets the triangle X0 X1 X2 where the edge functions
// E0 = (u, v, 1) . (X1 x X2), E1 and E2 likewise, have one sign; E / sum(E) are then the weights of the corners in
// space, perspective included (Olano and Greer, "Triangle scan conversion using 2D homogeneous coordinates", 1997).
// So triangles that pass behind the camera need no cutting: their pixels are refused one by one by depth. Edge
// functions are float64, whose rounding is far below a pixel for every triangle that can occur.
#pragma once
#include <math.h>
#include <stdint.h>

namespace smope_scenes {

constexpr int kDrawWords = 32;   // float32 words of a draw; their order is in smope/scenes/raster_table.py
constexpr int kToCamera = 0, kColour = 12, kGamma = 24, kGrain = 25, kMaterial = 28, kMesh = 29, kMarks = 30;
constexpr int kMaps = 2;         // light views of an image
constexpr int kViews = kMaps + 2;  // the picture, the light views, the silhouette tile
constexpr int kTileView = kMaps + 1;
constexpr int kTile = 64;        // side of a silhouette tile, pixels
constexpr int kFaceBits = 24;    // of a draw's number in its image and a face's in its mesh, together 32
constexpr uint64_t kNothing = ~uint64_t{0};

struct Mesh {               // all meshes behind one another
    const float* position;  // [V, 3] metres
    const int32_t* face;    // [F, 3] indices into the above
    const int32_t* range;   // [M, 2] first face and number of faces
};

// One batch. smope/scenes/raster_cuda.py fills this very struct: 64-bit words first, then 32-bit ones.
struct Batch {
    Mesh fine, coarse;
    const float* normal;    // [V, 3] of the fine meshes
    const uint8_t* colour;  // [V, 4] sRGB of the fine meshes
    const float* draws;     // [B, D, kDrawWords]
    const float* rows;      // [B, row_words]
    uint64_t* nearest;      // [B, H, W] depth bits, then draw and face; kNothing at first
    uint32_t* light;        // [B, kMaps, S, S] bits of the depths 0..1; those of 1.0 at first
    uint8_t* tiles;         // [B, N, 64, 64] 0 at first
    uint32_t* albedo;       // [B, H, W] four bytes each
    uint32_t* surface;      // [B, H, W] four bytes each: the normal
    float* depth;           // [B, H, W] metres
    uint32_t* queue;        // [queue_room, 4] large triangles, in pieces
    unsigned long long* queued;  // how many pieces there are, those without room included; 0 at first
    int64_t queue_room;
    int32_t images, draws_an_image, row_words, row_K, row_boxes, row_light;
    int32_t width, height, shadow, targets;
    float near, far;
};

struct Corner {
    double x, y, w;
    float depth;
};

struct Triangle {
    double a[3], b[3], c[3];  // edge functions a u + b v + c, none negative inside
    float depth[3];
    int u0, v0, u1, v1;       // pixels it may cover, inclusive
    bool front;               // its corners run counterclockwise as seen by the camera
};

struct Target {  // what a view is drawn into
    int width, height;
    float lowest, highest;  // depths that are kept
    double least_w;         // corners nearer than this are cut off for the bounding box
};

__host__ __device__ inline float dot4(const float* row, float x, float y, float z, float w) {
    return row[0] * x + row[1] * y + row[2] * z + row[3] * w;
}

__host__ __device__ inline uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    union { float number; uint32_t bits; } both = {x};
    return both.bits;
#endif
}

__host__ __device__ inline float float_of(uint32_t x) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(x);
#else
    union { uint32_t bits; float number; } both = {x};
    return both.number;
#endif
}

__host__ __device__ inline Target target_of(const Batch& batch, int view) {
    if (view == 0) return {batch.width, batch.height, batch.near, batch.far, batch.near};
    if (view < kTileView) return {batch.shadow, batch.shadow, 0.f, 1.f, 0.5};
    return {kTile, kTile, batch.near, batch.far, batch.near};
}

// Corner `position` of a draw in a view. `row` describes the image, `draw` the draw.
__host__ __device__ inline Corner corner_of(const Batch& batch, const float* row, const float* draw, int view,
                                            const float* position) {
    const float x = position[0], y = position[1], z = position[2];
    const float* T = draw + kToCamera;
    const float cx = dot4(T, x, y, z, 1.f), cy = dot4(T + 4, x, y, z, 1.f), cz = dot4(T + 8, x, y, z, 1.f);
    if (view != 0 && view < kTileView) {
        const float* P = row + batch.row_light + 12 * (view - 1);
        const double half = 0.5 * batch.shadow;
        return {(dot4(P, cx, cy, cz, 1.f) + 1.0) * half - 0.5, (dot4(P + 4, cx, cy, cz, 1.f) + 1.0) * half - 0.5, 1.0,
                dot4(P + 8, cx, cy, cz, 1.f) * 0.5f + 0.5f};
    }
    const float* K = row + batch.row_K;
    const double u = static_cast<double>(K[0]) * cx + static_cast<double>(K[1]) * cy + static_cast<double>(K[2]) * cz;
    const double v = static_cast<double>(K[4]) * cy + static_cast<double>(K[5]) * cz;
    if (view == 0) return {u, v, cz, cz};
    // The target's box fills its tile: border to border, not centre to centre.
    const float* box = row + batch.row_boxes + 4 * (static_cast<int>(draw[kMaterial]) - 1);
    const double wide = fmax(static_cast<double>(box[2]) - box[0], 1e-6);
    const double high = fmax(static_cast<double>(box[3]) - box[1], 1e-6);
    return {(u - static_cast<double>(box[0]) * cz) * (kTile / wide) - 0.5 * cz,
            (v - static_cast<double>(box[1]) * cz) * (kTile / high) - 0.5 * cz, cz, cz};
}

// The smallest and the largest pixel coordinate of the part with w >= least_w along one axis.
__host__ __device__ inline void extent_of(const double (&x)[3], const double (&w)[3], double least_w, float& least,
                                          float& largest) {
    if (w[0] >= least_w && w[1] >= least_w && w[2] >= least_w) {  // nearly always; float64 divisions are slow
        float at[3];
        for (int i = 0; i < 3; ++i) at[i] = static_cast<float>(x[i]) / static_cast<float>(w[i]);
        least = fminf(fminf(at[0], at[1]), at[2]), largest = fmaxf(fmaxf(at[0], at[1]), at[2]);
        return;
    }
    double low = 1e30, high = -1e30;
    for (int i = 0; i < 3; ++i) {
        const int j = i == 2 ? 0 : i + 1;
        if (w[i] >= least_w) {
            const double at = x[i] / w[i];
            low = fmin(low, at), high = fmax(high, at);
        }
        if ((w[i] >= least_w) != (w[j] >= least_w)) {
            const double at = (x[i] + (least_w - w[i]) / (w[j] - w[i]) * (x[j] - x[i])) / least_w;
            low = fmin(low, at), high = fmax(high, at);
        }
    }
    least = static_cast<float>(low), largest = static_cast<float>(high);
}

// First and last whole number in [low, high] and in [0, size). The edge functions decide about pixels, so that this
// may take in more; the margin is far above the rounding of any coordinate near the target.
__host__ __device__ inline void whole_numbers(float low, float high, int size, int& first, int& last) {
    const float margin = 1.f / 128;
    first = static_cast<int>(ceilf(fminf(fmaxf(low - margin, 0.f), static_cast<float>(size))));
    last = static_cast<int>(floorf(fmaxf(fminf(high + margin, size - 1.f), -1.f)));
}

// False where no pixel of the target can be covered.
__host__ __device__ inline bool set_up(const Corner (&corner)[3], const Target& target, Triangle& out) {
    const double x[3] = {corner[0].x, corner[1].x, corner[2].x};
    const double y[3] = {corner[0].y, corner[1].y, corner[2].y};
    const double w[3] = {corner[0].w, corner[1].w, corner[2].w};
    float low, high;
    extent_of(x, w, target.least_w, low, high);
    whole_numbers(low, high, target.width, out.u0, out.u1);
    if (!(out.u0 <= out.u1)) return false;
    extent_of(y, w, target.least_w, low, high);
    whole_numbers(low, high, target.height, out.v0, out.v1);
    if (!(out.v0 <= out.v1)) return false;
    for (int i = 0; i < 3; ++i) {
        const int j = (i + 1) % 3, k = (i + 2) % 3;
        out.a[i] = y[j] * w[k] - w[j] * y[k];
        out.b[i] = w[j] * x[k] - x[j] * w[k];
        out.c[i] = x[j] * y[k] - y[j] * x[k];
        out.depth[i] = corner[i].depth;
    }
    const double volume = out.a[0] * x[0] + out.b[0] * y[0] + out.c[0] * w[0];
    if (!(volume < 0 || volume > 0)) return false;  // seen edge-on, or a point or a line; NaN too
    out.front = volume < 0;  // y points down: what is counterclockwise to the eye is negative here
    if (volume < 0)
        for (int i = 0; i < 3; ++i) out.a[i] = -out.a[i], out.b[i] = -out.b[i], out.c[i] = -out.c[i];
    return true;
}

// The corners' weights at a pixel, not yet divided by their sum; false outside.
__host__ __device__ inline bool weights_at(const Triangle& triangle, int u, int v, float (&weight)[3]) {
    double e[3];
    for (int i = 0; i < 3; ++i) e[i] = triangle.a[i] * u + triangle.b[i] * v + triangle.c[i];
    if (!(e[0] >= 0 && e[1] >= 0 && e[2] >= 0)) return false;
    const float sum = static_cast<float>(e[0] + e[1] + e[2]);
    if (!(sum > 1e-30f)) return false;  // three points in a line
    const float inverse = 1.f / sum;
    for (int i = 0; i < 3; ++i) weight[i] = static_cast<float>(e[i]) * inverse;
    return true;
}

__host__ __device__ inline int load_triangle(const Batch& batch, int draw_number, int view, int face,
                                             const int32_t*& index, Corner (&corner)[3]) {
    const int image = draw_number / batch.draws_an_image;
    const float* draw = batch.draws + static_cast<int64_t>(draw_number) * kDrawWords;
    const float* row = batch.rows + static_cast<int64_t>(image) * batch.row_words;
    const Mesh& mesh = view == 0 ? batch.fine : batch.coarse;
    const int first = mesh.range[2 * static_cast<int>(draw[kMesh])];
    index = mesh.face + 3 * (static_cast<int64_t>(first) + face);
    for (int i = 0; i < 3; ++i)
        corner[i] = corner_of(batch, row, draw, view, mesh.position + 3 * static_cast<int64_t>(index[i]));
    return image;
}

// Three waves over the surface at a vertex, and into one: of mean 0, within -2..2.
__host__ __device__ inline float waves_at(const float* p, float waves, float phase) {
    const float turned[3] = {p[1], p[2], p[0]}, other[3] = {p[2], p[0], p[1]};
    float wave[3];
    for (int i = 0; i < 3; ++i) wave[i] = sinf(turned[i] * waves + phase + 2.f * sinf(other[i] * waves * 0.37f));
    return wave[0] + wave[1] * wave[2];
}

// sRGB of a vertex: its scanned colour, mapped, with grain and with marks, which are dark or, of negative
// strength, light.
__host__ __device__ inline void albedo_of(const Batch& batch, const float* draw, int64_t vertex, float (&out)[3]) {
    const float* p = batch.fine.position + 3 * vertex;
    const uint8_t* colour = batch.colour + 4 * vertex;
    const float r = colour[0] / 255.f, g = colour[1] / 255.f, b = colour[2] / 255.f;
    const float phase = draw[kGrain + 2], strength = draw[kMarks];
    const float grain = 1.f + draw[kGrain] * waves_at(p, draw[kGrain + 1], phase);
    const float mark = fminf(fmaxf((waves_at(p, draw[kMarks + 1], -phase) - 0.8f) * 3.f, 0.f), 1.f);
    for (int i = 0; i < 3; ++i) {
        const float mapped = fminf(fmaxf(dot4(draw + kColour + 4 * i, r, g, b, 1.f), 0.f), 1.f);
        const float plain = powf(mapped, draw[kGamma]) * grain;
        out[i] = plain + mark * fabsf(strength) * ((strength < 0.f ? 1.f : 0.f) - plain);
    }
}

__host__ __device__ inline uint32_t byte_of(float x) {  // 0..1 to 0..255
    return static_cast<uint32_t>(fminf(fmaxf(x, 0.f), 1.f) * 255.f + 0.5f);
}

// What is seen through pixel `at` of the batch: writes its colour and id, normal and depth.
__host__ __device__ inline void resolve(const Batch& batch, int64_t at) {
    const uint64_t key = batch.nearest[at];
    if (key == kNothing) {
        batch.albedo[at] = 0, batch.surface[at] = 0, batch.depth[at] = 0.f;
        return;
    }
    const int64_t pixels = static_cast<int64_t>(batch.width) * batch.height;
    const uint32_t winner = static_cast<uint32_t>(key);
    const int image = static_cast<int>(at / pixels), inside = static_cast<int>(at % pixels);
    const int draw_number = image * batch.draws_an_image + static_cast<int>(winner >> kFaceBits);
    const float* draw = batch.draws + static_cast<int64_t>(draw_number) * kDrawWords;
    const int32_t* index;
    Corner corner[3];
    load_triangle(batch, draw_number, 0, static_cast<int>(winner & ((1u << kFaceBits) - 1)), index, corner);
    Triangle triangle = {};
    float weight[3] = {1.f, 0.f, 0.f};
    if (set_up(corner, target_of(batch, 0), triangle))
        weights_at(triangle, inside % batch.width, inside / batch.width, weight);
    float albedo[3] = {}, n[3] = {};
    for (int i = 0; i < 3; ++i) {
        float colour[3];
        albedo_of(batch, draw, index[i], colour);
        const float* normal = batch.normal + 3 * static_cast<int64_t>(index[i]);
        for (int k = 0; k < 3; ++k) {
            albedo[k] += weight[i] * colour[k];
            n[k] += weight[i] * normal[k];
        }
    }
    float direction[3], square = 0.f;
    for (int k = 0; k < 3; ++k) {
        direction[k] = dot4(draw + kToCamera + 4 * k, n[0], n[1], n[2], 0.f);
        square += direction[k] * direction[k];
    }
    // Single sheets are seen from behind too; the winding decides, so silhouettes keep their smooth normals.
    const float scale = (triangle.front ? 0.5f : -0.5f) / sqrtf(fmaxf(square, 1e-30f));
    batch.albedo[at] = byte_of(albedo[0]) | byte_of(albedo[1]) << 8 | byte_of(albedo[2]) << 16 |
                       static_cast<uint32_t>(draw[kMaterial]) << 24;
    batch.surface[at] = byte_of(direction[0] * scale + 0.5f) | byte_of(direction[1] * scale + 0.5f) << 8 |
                        byte_of(direction[2] * scale + 0.5f) << 16 | 255u << 24;
    batch.depth[at] = float_of(static_cast<uint32_t>(key >> 32));
}

}  // namespace smope_scenes
