// Deformable attention on a CPU, float32, forward and backward: plain C++ and OpenMP, nothing of torch. The loops over
// a head's channels are written for the compiler to vectorise; smope/ops/cpu.py calls the two functions at the end.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Problem {
    int64_t batch, queries, heads, channels, levels, points, cells;
    int sides;           // 2: reference points, 4: boxes
    const int* shapes;   // h, w of each level
    const float* value;  // [batch, cells, heads, channels]
    const float* reference;  // [batch, queries, levels, sides]
    const float* offsets;    // [batch, queries, heads, levels, points, 2]
    const float* logits;     // [batch, queries, heads, levels, points]

    int64_t samples() const { return levels * points; }
    int64_t stride() const { return heads * channels; }
};

// A sample: its four corners (a row of zeros where one lies outside) and what bilinear weights are made of.
struct Sample {
    const float* corner[4];  // top left, top right, bottom left, bottom right
    int64_t row[4];          // the corner's place in value, or -1
    float x, y;              // 0..1 within the cell of four corners
    bool inside;             // at least one corner lies in the level

    void weights(float* w) const {
        w[0] = (1 - y) * (1 - x), w[1] = (1 - y) * x, w[2] = y * (1 - x), w[3] = y * x;
    }
};

// Cells of the level that one unit of offset moves a sample.
inline void step_of(const Problem& p, const float* reference, int64_t level, float* step) {
    const float scale = 0.5f / static_cast<float>(p.points);
    step[0] = p.sides == 2 ? 1 : reference[2] * scale * static_cast<float>(p.shapes[2 * level + 1]);
    step[1] = p.sides == 2 ? 1 : reference[3] * scale * static_cast<float>(p.shapes[2 * level]);
}

inline Sample locate(const float* image, int64_t stride, int height, int width, float x, float y, const float* zeros) {
    Sample s;
    s.inside = x > -1 && y > -1 && x < static_cast<float>(width) && y < static_cast<float>(height);  // false for NaN
    if (!s.inside) return s;
    const float left = std::floor(x), top = std::floor(y);
    s.x = x - left, s.y = y - top;
    const int column = static_cast<int>(left), row = static_cast<int>(top);
    const bool in_x[2] = {column >= 0, column + 1 < width}, in_y[2] = {row >= 0, row + 1 < height};
    for (int i = 0; i < 4; ++i) {
        const bool in = in_x[i & 1] && in_y[i >> 1];
        s.row[i] = in ? (static_cast<int64_t>(row + (i >> 1)) * width + column + (i & 1)) * stride : -1;
        s.corner[i] = in ? image + s.row[i] : zeros;
    }
    return s;
}

inline void softmax(const float* logits, int64_t count, float* weights) {
    float most = logits[0], sum = 0;
    for (int64_t i = 1; i < count; ++i) most = std::max(most, logits[i]);
    for (int64_t i = 0; i < count; ++i) sum += weights[i] = std::exp(logits[i] - most);
    for (int64_t i = 0; i < count; ++i) weights[i] /= sum;
}

// One query and head. `Channels` is the number of channels, or 0 where only `p` knows it.
template <int Channels>
void attend(const Problem& p, int64_t image, int64_t query, int64_t head, float* weights, const float* zeros,
            float* output) {
    const int64_t channels = Channels ? Channels : p.channels, stride = p.stride();
    const int64_t place = image * p.queries + query, first = (place * p.heads + head) * p.samples();
    softmax(p.logits + first, p.samples(), weights);
    const float* offset = p.offsets + 2 * first;
    const float* value = p.value + image * p.cells * stride + head * channels;
    float* sum = output + place * stride + head * channels;
    std::fill_n(sum, channels, 0.0f);
    for (int64_t level = 0; level < p.levels; ++level) {
        const int height = p.shapes[2 * level], width = p.shapes[2 * level + 1];
        const float* reference = p.reference + (place * p.levels + level) * p.sides;
        const float x = reference[0] * static_cast<float>(width) - 0.5f;
        const float y = reference[1] * static_cast<float>(height) - 0.5f;
        float step[2];
        step_of(p, reference, level, step);
        for (int64_t point = 0; point < p.points; ++point, offset += 2, ++weights) {
            const Sample s =
                locate(value, stride, height, width, x + offset[0] * step[0], y + offset[1] * step[1], zeros);
            if (!s.inside) continue;
            float w[4];
            s.weights(w);
            for (float& part : w) part *= *weights;
            const float *a = s.corner[0], *b = s.corner[1], *c = s.corner[2], *d = s.corner[3];
#pragma omp simd
            for (int64_t i = 0; i < channels; ++i) sum[i] += w[0] * a[i] + w[1] * b[i] + w[2] * c[i] + w[3] * d[i];
        }
        value += static_cast<int64_t>(height) * width * stride;
    }
}

template <int Channels>
void differentiate(const Problem& p, int64_t image, int64_t query, int64_t head, bool in_cells, float* weights,
                   float* grad_weights, const float* zeros, const float* grad_output, float* grad_value,
                   float* grad_offsets, float* grad_logits) {
    const int64_t channels = Channels ? Channels : p.channels, stride = p.stride(), samples = p.samples();
    const int64_t place = image * p.queries + query, first = (place * p.heads + head) * samples;
    softmax(p.logits + first, samples, weights);
    const float* value = p.value + image * p.cells * stride + head * channels;
    float* into = grad_value + image * p.cells * stride + head * channels;
    const float* given = grad_output + place * stride + head * channels;
    float mean = 0;  // sum over samples of weight times its gradient, for softmax's backward
    int64_t k = 0;
    for (int64_t level = 0; level < p.levels; ++level) {
        const int height = p.shapes[2 * level], width = p.shapes[2 * level + 1];
        const float* reference = p.reference + (place * p.levels + level) * p.sides;
        const float x = reference[0] * static_cast<float>(width) - 0.5f;
        const float y = reference[1] * static_cast<float>(height) - 0.5f;
        float step[2];
        step_of(p, reference, level, step);
        for (int64_t point = 0; point < p.points; ++point, ++k) {
            const float* offset = p.offsets + 2 * (first + k);
            float* moved = grad_offsets + 2 * (first + k);
            const Sample s =
                locate(value, stride, height, width, x + offset[0] * step[0], y + offset[1] * step[1], zeros);
            moved[0] = moved[1] = grad_weights[k] = 0;
            if (!s.inside) continue;
            const float *a = s.corner[0], *b = s.corner[1], *c = s.corner[2], *d = s.corner[3];
            float da = 0, db = 0, dc = 0, dd = 0;  // products of the given gradient with each corner
#pragma omp simd reduction(+ : da, db, dc, dd)
            for (int64_t i = 0; i < channels; ++i) {
                da += given[i] * a[i], db += given[i] * b[i], dc += given[i] * c[i], dd += given[i] * d[i];
            }
            float w[4];
            s.weights(w);
            grad_weights[k] = w[0] * da + w[1] * db + w[2] * dc + w[3] * dd;
            mean += weights[k] * grad_weights[k];
            moved[0] = weights[k] * ((1 - s.y) * (db - da) + s.y * (dd - dc)) * (in_cells ? 1 : step[0]);
            moved[1] = weights[k] * ((1 - s.x) * (dc - da) + s.x * (dd - db)) * (in_cells ? 1 : step[1]);
            for (int corner = 0; corner < 4; ++corner) {
                if (s.row[corner] < 0) continue;
                const float share = weights[k] * w[corner];
                float* row = into + s.row[corner];
#pragma omp simd
                for (int64_t i = 0; i < channels; ++i) row[i] += share * given[i];
            }
        }
        value += static_cast<int64_t>(height) * width * stride;
        into += static_cast<int64_t>(height) * width * stride;
    }
    for (k = 0; k < samples; ++k) grad_logits[first + k] = weights[k] * (grad_weights[k] - mean);
}

Problem problem_of(const int64_t* sizes, const int* shapes, const float* value, const float* reference,
                   const float* offsets, const float* logits) {
    Problem p = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], 0, static_cast<int>(sizes[6]), shapes,
                 value,    reference, offsets, logits};
    for (int64_t level = 0; level < p.levels; ++level) {
        p.cells += static_cast<int64_t>(shapes[2 * level]) * shapes[2 * level + 1];
    }
    return p;
}

template <int Channels>
void forward(const Problem& p, int threads, float* output) {
    const int64_t total = p.batch * p.queries;
#pragma omp parallel num_threads(threads)
    {
        const std::vector<float> zeros(p.channels, 0.0f);
        std::vector<float> weights(p.samples());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < total; ++i) {
            for (int64_t head = 0; head < p.heads; ++head) {
                attend<Channels>(p, i / p.queries, i % p.queries, head, weights.data(), zeros.data(), output);
            }
        }
    }
}

// A thread owns whole heads of whole images, so that no two add to one cell: nothing is atomic, and the order of the
// sums, hence their rounding, is the same with any number of threads.
template <int Channels>
void backward(const Problem& p, int threads, bool in_cells, const float* grad_output, float* grad_value,
              float* grad_offsets, float* grad_logits) {
    const int64_t total = p.batch * p.heads;
#pragma omp parallel num_threads(threads)
    {
        const std::vector<float> zeros(p.channels, 0.0f);
        std::vector<float> weights(p.samples()), grad_weights(p.samples());
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < total; ++i) {
            for (int64_t query = 0; query < p.queries; ++query) {
                differentiate<Channels>(p, i / p.heads, query, i % p.heads, in_cells, weights.data(),
                                        grad_weights.data(), zeros.data(), grad_output, grad_value, grad_offsets,
                                        grad_logits);
            }
        }
    }
}

}  // namespace

// sizes: batch, queries, heads, channels, levels, points, sides. All arrays are dense and float32.
extern "C" void smope_msda_cpu_forward(const int64_t* sizes, const int* shapes, const float* value,
                                       const float* reference, const float* offsets, const float* logits, float* output,
                                       int threads) {
    const Problem p = problem_of(sizes, shapes, value, reference, offsets, logits);
    switch (p.channels) {
        case 16: return forward<16>(p, threads, output);
        case 32: return forward<32>(p, threads, output);
        case 64: return forward<64>(p, threads, output);
        default: return forward<0>(p, threads, output);
    }
}

// grad_value is zeroed by the caller. in_cells: grad_offsets is that of the locations, in cells of their level.
extern "C" void smope_msda_cpu_backward(const int64_t* sizes, const int* shapes, const float* value,
                                        const float* reference, const float* offsets, const float* logits,
                                        const float* grad_output, float* grad_value, float* grad_offsets,
                                        float* grad_logits, int in_cells, int threads) {
    const Problem p = problem_of(sizes, shapes, value, reference, offsets, logits);
    switch (p.channels) {
        case 16: return backward<16>(p, threads, in_cells, grad_output, grad_value, grad_offsets, grad_logits);
        case 32: return backward<32>(p, threads, in_cells, grad_output, grad_value, grad_offsets, grad_logits);
        case 64: return backward<64>(p, threads, in_cells, grad_output, grad_value, grad_offsets, grad_logits);
        default: return backward<0>(p, threads, in_cells, grad_output, grad_value, grad_offsets, grad_logits);
    }
}
