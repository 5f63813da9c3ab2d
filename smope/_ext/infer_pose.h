// What the recorded pass does with poses; read after infer.h.
namespace smope {

DEVICE float at_least(float v, float low) { return v < low ? low : v; }  // and what is no number stays none

DEVICE void normalize(float (&v)[3]) {
    const float length = at_least(sqrtf(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]), 1e-12f);
#pragma unroll
    for (int i = 0; i < 3; ++i) v[i] /= length;
}

// Of all inputs here that have a row for each pair or point, rows are as far apart as template arguments of their
// names say.

// The direct pose of a pair, a thread each: smope/networks/pose_head.py says what is computed.
template <class T, int P, int TURN, int SHIFT, int FACTOR, int BOX, int DIAMETER>
DEVICE void direct_pose(const typename T::Stored* __restrict__ rotation6, const typename T::Stored* __restrict__ shift,
                        const typename T::Stored* __restrict__ log_factor, const float* __restrict__ boxes,
                        const float* __restrict__ diameters, const float* __restrict__ cameras,
                        float* __restrict__ out, float width, float height, long long pairs) {
    const long long pair = THREAD;
    if (pair >= pairs) return;
    const float *k = cameras + pair / P * 9, *box = boxes + pair * BOX;
    const float fx = k[0], skew = k[1], fy = k[4];
    const float across = at_least(box[2] * width, 1.f), down = at_least(box[3] * height, 1.f);
    const float u = box[0] * width - 0.5f + T::wide(shift[pair * SHIFT]) * across;
    const float v = box[1] * height - 0.5f + T::wide(shift[pair * SHIFT + 1]) * down;
    const float factor = expf(within(T::wide(log_factor[pair * FACTOR]), -3.f, 3.f));
    const float depth = sqrtf(fx * fy) * diameters[pair * DIAMETER] / sqrtf(across * down) * factor;
    const float ray[3] = {u / fx - v * skew / (fx * fy) + (skew * k[5] / fy - k[2]) / fx, v / fy - k[5] / fy, 1.f};
    // Two columns by Gram-Schmidt, the third their cross product; then turned onto the ray.
    float first[3], second[3], along[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        first[i] = T::wide(rotation6[pair * TURN + i]);
        second[i] = T::wide(rotation6[pair * TURN + 3 + i]);
        along[i] = ray[i];
    }
    normalize(first);
    const float common = first[0] * second[0] + first[1] * second[1] + first[2] * second[2];
#pragma unroll
    for (int i = 0; i < 3; ++i) second[i] -= common * first[i];
    normalize(second);
    const float third[3] = {first[1] * second[2] - first[2] * second[1], first[2] * second[0] - first[0] * second[2],
                            first[0] * second[1] - first[1] * second[0]};
    normalize(along);
    const float x = along[0], y = along[1], z = along[2], a = 1.f / (1.f + z);
    const float onto[9] = {1.f - a * x * x, -a * x * y, x, -a * x * y, 1.f - a * y * y, y, -x, -y, z};
    float* to = out + pair * 14;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const float *row = onto + 3 * i;
        to[3 * i] = row[0] * first[0] + row[1] * first[1] + row[2] * first[2];
        to[3 * i + 1] = row[0] * second[0] + row[1] * second[1] + row[2] * second[2];
        to[3 * i + 2] = row[0] * third[0] + row[1] * third[1] + row[2] * third[2];
        to[9 + i] = ray[i] * depth;
    }
    to[12] = u;
    to[13] = v;
}

// Where a pose puts its A anchors, a thread each: smope/networks/refine.py says what is computed.
template <class T, int P, int A, int TURN, int SHIFT, int ANCHOR, int DIAMETER>
DEVICE void place_anchors(const float* __restrict__ rotation, const float* __restrict__ translation,
                          const float* __restrict__ anchors, const float* __restrict__ diameters,
                          const float* __restrict__ cameras, typename T::Stored* __restrict__ placed,
                          float* __restrict__ uv, float* __restrict__ unit, float width, float height,
                          long long points) {
    const long long point = THREAD, pair = point / A;
    if (point >= points) return;
    const float *k = cameras + pair / P * 9, *r = rotation + pair * TURN, *t = translation + pair * SHIFT;
    const float *anchor = anchors + point * ANCHOR, diameter = diameters[pair * DIAMETER];
    typename T::Stored* to = placed + point * 15;
    float at[3];
#pragma unroll
    for (int i = 0; i < 9; ++i) to[i] = T::narrow(anchor[i]);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const float arm = r[3 * i] * (diameter * anchor[0]) + r[3 * i + 1] * (diameter * anchor[1]) +
                          r[3 * i + 2] * (diameter * anchor[2]);
        at[i] = arm + t[i];
        to[9 + i] = T::narrow(arm / diameter);
        to[12 + i] = T::narrow(r[3 * i] * anchor[3] + r[3 * i + 1] * anchor[4] + r[3 * i + 2] * anchor[5]);
    }
    const float z = at_least(at[2], 1e-2f), sx = at[0] / z, sy = at[1] / z, sz = at[2] / z;
    const float u = k[0] * sx + k[1] * sy + k[2] * sz, v = k[3] * sx + k[4] * sy + k[5] * sz;
    uv[point * 2] = u;
    uv[point * 2 + 1] = v;
    unit[point * 2] = (u + 0.5f) / width;
    unit[point * 2 + 1] = (v + 0.5f) / height;
}

// A row of what a pass gives, a thread each: `find_table` in smope/results.py says what is in it.
template <class S, class V, int SCORE, int LABEL, int BOX, int TURN, int SHIFT, int SEEN, int SIGMA, int SCALE>
DEVICE void table_row(const typename S::Stored* __restrict__ scores, const float* __restrict__ labels,
                      const float* __restrict__ boxes, const float* __restrict__ rotation,
                      const float* __restrict__ translation, const typename V::Stored* __restrict__ seen,
                      const typename V::Stored* __restrict__ log_sigma, const float* __restrict__ scale,
                      float* __restrict__ out, float width, float height, long long pairs) {
    const long long pair = THREAD;
    if (pair >= pairs) return;
    const float* box = boxes + pair * BOX;
    float* to = out + pair * 24;
    to[0] = S::wide(scores[pair * SCORE]);
    to[1] = labels[pair * LABEL];
    to[2] = (box[0] - box[2] / 2.f) * width - 0.5f;
    to[3] = (box[1] - box[3] / 2.f) * height - 0.5f;
    to[4] = (box[0] + box[2] / 2.f) * width - 0.5f;
    to[5] = (box[1] + box[3] / 2.f) * height - 0.5f;
#pragma unroll
    for (int i = 0; i < 9; ++i) to[6 + i] = rotation[pair * TURN + i];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        to[15 + i] = translation[pair * SHIFT + i];
        to[21 + i] = scale[pair * SCALE + i];
    }
    to[18] = V::wide(seen[pair * SEEN]);
    to[19] = V::wide(log_sigma[pair * SIGMA]);
    to[20] = V::wide(log_sigma[pair * SIGMA + 1]);
}

// One pose a warp from A points: smope/networks/gauss_newton.py says what is computed, in the same names. LAYER: as a
// layer says it, weights as logits and prior_weight before its softplus.
template <class W, class Q, bool LAYER, int P, int A, int STEPS, bool RELATIVE, int TURN, int SHIFT, int POINT,
          int TARGET, int WEIGHT, int PRIOR, int STIFF, int DIAMETER>
DEVICE void fit_pose(const float* __restrict__ rotation, const float* __restrict__ translation,
                     const float* __restrict__ points, const typename W::Stored* __restrict__ targets,
                     const typename W::Stored* __restrict__ weights, const typename Q::Stored* __restrict__ prior_step,
                     const typename Q::Stored* __restrict__ prior_weight, const float* __restrict__ diameters,
                     const float* __restrict__ cameras, float* __restrict__ out, long long pairs) {
    const long long pair = THREAD / WARP;
    const int lane = (int)(THREAD % WARP);
    if (pair >= pairs) return;
    const float* k = cameras + pair / P * 9;
    const float fx = k[0], fy = k[4], focal = sqrtf(fx * fy), diameter = diameters[pair * DIAMETER];
    float r[9], t[3], moved[6];
#pragma unroll
    for (int i = 0; i < 9; ++i) r[i] = rotation[pair * TURN + i];
#pragma unroll
    for (int i = 0; i < 3; ++i) t[i] = translation[pair * SHIFT + i];
#pragma unroll
    for (int i = 0; i < 6; ++i) moved[i] = 0.f;
    for (int turn = 0; turn < STEPS; ++turn) {
        const float depth = fmaxf(t[2], 1e-2f), apparent = focal * diameter / depth;
        float normal[6][6], right[6];
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            right[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 6; ++j) normal[i][j] = 0.f;
        }
        for (int a = lane; a < A; a += WARP) {
            const long long at = pair * A + a;
            const float px = points[at * POINT], py = points[at * POINT + 1], pz = points[at * POINT + 2];
            const float qx = r[0] * px + r[1] * py + r[2] * pz, qy = r[3] * px + r[4] * py + r[5] * pz,
                        qz = r[6] * px + r[7] * py + r[8] * pz;
            const float X = diameter * qx + t[0], Y = diameter * qy + t[1], Z = diameter * qz + t[2];
            const float z = fmaxf(Z, 1e-2f), ax = X / z, ay = Y / z;
            float ox = W::wide(targets[at * TARGET]), oy = W::wide(targets[at * TARGET + 1]);
            if (!RELATIVE) {
                ox = (ox - (k[0] * ax + k[1] * ay + k[2] * (Z / z))) / apparent;
                oy = (oy - (k[3] * ax + k[4] * ay + k[5] * (Z / z))) / apparent;
            }
            const float gx = fx / z * (depth / focal), gy = fy / z * (depth / focal);
            const float tx = t[0] / diameter, ty = t[1] / diameter, tz = t[2] / diameter;
            const float mz[6] = {qy, -qx, 0.f, 0.f, 0.f, tz};
            const float mx[6] = {0.f, qz, -qy, 1.f, 0.f, tx}, my[6] = {-qz, 0.f, qx, 0.f, 1.f, ty};
            const float trust = W::wide(weights[at * WEIGHT]);
            const float w = (LAYER ? 1.f / (1.f + expf(-trust)) : trust) / A;
            float jx[6], jy[6];
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                jx[i] = gx * (mx[i] - ax * mz[i]);
                jy[i] = gy * (my[i] - ay * mz[i]);
            }
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                right[i] += w * (jx[i] * ox + jy[i] * oy);
#pragma unroll
                for (int j = 0; j <= i; ++j) normal[i][j] += w * (jx[i] * jx[j] + jy[i] * jy[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            const float held = Q::wide(prior_weight[pair * STIFF + i]);
            const float stiff = LAYER ? (held > 20.f ? held : log1pf(expf(held))) * 0.1f + 1e-4f : held;
            right[i] = warp_sum(right[i]) + stiff * (Q::wide(prior_step[pair * PRIOR + i]) - moved[i]);
#pragma unroll
            for (int j = 0; j <= i; ++j) normal[i][j] = warp_sum(normal[i][j]);
            normal[i][i] += stiff;
        }
        // Cholesky, then both triangles.
#pragma unroll
        for (int i = 0; i < 6; ++i) {
#pragma unroll
            for (int j = 0; j <= i; ++j) {
                float sum = normal[i][j];
#pragma unroll
                for (int m = 0; m < j; ++m) sum -= normal[i][m] * normal[j][m];
                normal[i][j] = i == j ? sqrtf(sum) : sum / normal[j][j];
            }
        }
#pragma unroll
        for (int i = 0; i < 6; ++i) {
#pragma unroll
            for (int m = 0; m < i; ++m) right[i] -= normal[i][m] * right[m];
            right[i] /= normal[i][i];
        }
#pragma unroll
        for (int i = 5; i >= 0; --i) {
#pragma unroll
            for (int m = i + 1; m < 6; ++m) right[i] -= normal[m][i] * right[m];
            right[i] /= normal[i][i];
        }
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < 6; ++i) most = fmaxf(most, fabsf(right[i]));
        const float too_long = fmaxf(most / LARGEST_STEP, 1.f);
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            right[i] /= too_long;
            moved[i] += right[i];
        }
        // Rodrigues' formula; below a millionth of a radian its first order.
        const float angle = sqrtf(right[0] * right[0] + right[1] * right[1] + right[2] * right[2]);
        const bool small = angle < 1e-6f;
        const float s = small ? 1.f : sinf(angle) / angle, c = small ? 0.f : (1.f - cosf(angle)) / (angle * angle);
        const float x = right[0], y = right[1], v = right[2];
        const float turn_by[9] = {1.f - c * (y * y + v * v), c * x * y - s * v, c * x * v + s * y,
                                  c * x * y + s * v, 1.f - c * (x * x + v * v), c * y * v - s * x,
                                  c * x * v - s * y, c * y * v + s * x, 1.f - c * (x * x + y * y)};
        float turned[9];
#pragma unroll
        for (int i = 0; i < 3; ++i)
#pragma unroll
            for (int j = 0; j < 3; ++j)
                turned[3 * i + j] =
                    turn_by[3 * i] * r[j] + turn_by[3 * i + 1] * r[3 + j] + turn_by[3 * i + 2] * r[6 + j];
#pragma unroll
        for (int i = 0; i < 9; ++i) r[i] = turned[i];
        const float further = expf(right[5]);
        t[0] = t[0] * further + right[3] * diameter;
        t[1] = t[1] * further + right[4] * diameter;
        t[2] = t[2] * further;
    }
    if (lane != 0) return;
#pragma unroll
    for (int i = 0; i < 9; ++i) out[pair * 12 + i] = r[i];
#pragma unroll
    for (int i = 0; i < 3; ++i) out[pair * 12 + 9 + i] = t[i];
}

}  // namespace smope
