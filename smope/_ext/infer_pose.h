// What the recorded pass does with poses; read after infer.h.
namespace smope {

// One pose a warp from A points: smope/networks/gauss_newton.py says what is computed, in the same names. Rows of
// points, targets, weights and priors are as far apart as the last template arguments say.
template <int P, int A, int STEPS, bool RELATIVE, int POINT, int TARGET, int WEIGHT, int PRIOR, int STIFF>
DEVICE void fit_pose(const float* __restrict__ rotation, const float* __restrict__ translation,
                     const float* __restrict__ points, const float* __restrict__ targets,
                     const float* __restrict__ weights, const float* __restrict__ prior_step,
                     const float* __restrict__ prior_weight, const float* __restrict__ diameters,
                     const float* __restrict__ cameras, float* __restrict__ out, long long pairs) {
    const long long pair = THREAD / WARP;
    const int lane = (int)(THREAD % WARP);
    if (pair >= pairs) return;
    const float* k = cameras + pair / P * 9;
    const float fx = k[0], fy = k[4], focal = sqrtf(fx * fy), diameter = diameters[pair];
    float r[9], t[3], moved[6];
#pragma unroll
    for (int i = 0; i < 9; ++i) r[i] = rotation[pair * 9 + i];
#pragma unroll
    for (int i = 0; i < 3; ++i) t[i] = translation[pair * 3 + i];
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
            float ox = targets[at * TARGET], oy = targets[at * TARGET + 1];
            if (!RELATIVE) {
                ox = (ox - (k[0] * ax + k[1] * ay + k[2] * (Z / z))) / apparent;
                oy = (oy - (k[3] * ax + k[4] * ay + k[5] * (Z / z))) / apparent;
            }
            const float gx = fx / z * (depth / focal), gy = fy / z * (depth / focal);
            const float tx = t[0] / diameter, ty = t[1] / diameter, tz = t[2] / diameter;
            const float mz[6] = {qy, -qx, 0.f, 0.f, 0.f, tz};
            const float mx[6] = {0.f, qz, -qy, 1.f, 0.f, tx}, my[6] = {-qz, 0.f, qx, 0.f, 1.f, ty};
            const float w = weights[at * WEIGHT] / A;
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
            const float stiff = prior_weight[pair * STIFF + i];
            right[i] = warp_sum(right[i]) + stiff * (prior_step[pair * PRIOR + i] - moved[i]);
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
