// One head of one document: QK-norm, RoPE, scores and their softmax, in float32.

#pragma once

#include <algorithm>
#include "numbers.h"

namespace {

// One head of one slot, normalised, times its gain and turned. N: its features, or 0 where they are not among BY_HEAD.
template <long N, class Q>
inline void turn_head(const Q* __restrict from, const float* __restrict gain, const float* __restrict phase,
                      float* __restrict to, float* __restrict y, long head, float eps) {
    const long K = N ? N : head;
    for (long i = 0; i < K; i++) y[i] = load(from + i);
    const float s = scale_of(y, K, eps);
    for (long i = 0; i < K; i++) y[i] *= s * gain[i];
    for (long j = 0; j < K / 2; j++) {
        const float c = phase[2 * j], w = phase[2 * j + 1];
        to[2 * j] = y[2 * j] * c - y[2 * j + 1] * w;
        to[2 * j + 1] = y[2 * j + 1] * c + y[2 * j] * w;
    }
}

// Its gradient; adds to that of the gain. x, g: space for K numbers.
template <long N, class Q>
inline void turn_back(const float* __restrict grad, const Q* __restrict from, const float* __restrict gain,
                      const float* __restrict phase, Q* __restrict to, float* __restrict to_gain, float* __restrict x,
                      float* __restrict g, long head, float eps) {
    const long K = N ? N : head;
    for (long j = 0; j < K / 2; j++) {
        const float c = phase[2 * j], w = phase[2 * j + 1];
        g[2 * j] = grad[2 * j] * c + grad[2 * j + 1] * w;
        g[2 * j + 1] = grad[2 * j + 1] * c - grad[2 * j] * w;
    }
    for (long i = 0; i < K; i++) x[i] = load(from + i);
    const float s = scale_of(x, K, eps);
    for (long i = 0; i < K; i++) {
        to_gain[i] += g[i] * x[i] * s;
        g[i] *= gain[i];
    }
    const float along = dot(g, x, K) * s * s / float(K);
    for (long i = 0; i < K; i++) store(to + i, s * (g[i] - x[i] * along));
}

constexpr int BLOCK = 6;  // queries that share what they load

// s[b][j] = sum over c of q[b][c] * turned[c][j], for J vectors of keys. q: rows of `width`; turned, s: rows of `line`.
template <int J>
APART void scores_of(const float* q, long width, const float* turned, long line, long K, float* s) {
    vec sums[BLOCK][J] = {};
    for (long c = 0; c < K; c++)
        for (int v = 0; v < J; v++) {
            const vec keys = at(turned + c * line + v * LANES);
            for (int b = 0; b < BLOCK; b++) sums[b][v] += q[b * width + c] * keys;
        }
    for (int b = 0; b < BLOCK; b++)
        for (int v = 0; v < J; v++) at(s + b * line + v * LANES) = sums[b][v];
}

inline void scores(const float* q, long width, const float* turned, long line, long K, long keys, float* s) {
    long j = 0;
    for (; j + 2 * LANES <= up(keys); j += 2 * LANES) scores_of<2>(q, width, turned + j, line, K, s + j);
    if (j < keys) scores_of<1>(q, width, turned + j, line, K, s + j);
}

// Rows of `width` numbers, LANES at a time, become columns, `line` numbers apart. Both are filled up to whole vectors.
inline void columns_of(const float* rows, long count, long width, float* to, long line) {
    for (long i = 0; i < count; i += LANES)
        for (long c = 0; c < width; c += LANES) turn_over(rows + i * width + c, width, to + c * line + i, line);
}

// A row of scores becomes their softmax over the first `seen` of them, and zeros up to `end`; its logsumexp comes back.
// `end`, here and below: a multiple of LANES, or the last few numbers would be worked on one by one.
APART float softmax(float* row, long seen, long end) {
    if (!seen) {
        std::fill(row, row + end, 0.0f);
        return 0.0f;
    }
    std::fill(row + seen, row + end, -INFINITY);
    float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (long j = 0; j < end; j++) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < end; j++) sum += row[j] = exp_of(row[j] - top);
    const float share = 1.0f / sum;
#pragma omp simd
    for (long j = 0; j < end; j++) row[j] *= share;
    return top + std::log(sum);
}

// Scores become weights again, and the gradient `of` the weights becomes that of the scores.
APART void softmax_back(float* row, float* of, long seen, long end, float logsumexp) {
    std::fill(row + seen, row + end, -INFINITY);
#pragma omp simd
    for (long j = 0; j < end; j++) row[j] = exp_of(row[j] - logsumexp);
    const float along = dot(row, of, end);
#pragma omp simd
    for (long j = 0; j < end; j++) of[j] = row[j] * (of[j] - along);
}

// One head of one document: q and k in float32, normalised and turned, and k turned over. Rows are filled up to whole
// vectors, and their number by BLOCK, with zeros.
struct Head {
    long L, K, line, width;
    Numbers q, k, k_over, space;

    template <long N, class Q>
    void fill(const Q* qkv, const float* gain_q, const float* gain_k, const float* phase, long stride, long from, long length,
              long H, long h, long size, float eps) {
        L = length;
        K = N ? N : size;
        line = up(L + BLOCK) | LANES;  // an odd number of cache lines: columns do not fall into the same few sets of a cache
        width = up(K);
        space.resize(K);
        k_over.resize(width * line);
        for (Numbers* rows : {&q, &k}) {
            rows->resize((up(L) + LANES) * width);
            std::fill(rows->data() + L * width, rows->data() + (up(L) + LANES) * width, 0.0f);
        }
        for (long i = 0; i < L; i++) {
            const Q* row = qkv + ((from + i) * 3 * H + h) * K;
            const float* turn = phase + (from + i) * stride;
            float *to_q = q.data() + i * width, *to_k = k.data() + i * width;
            turn_head<N>(row, gain_q, turn, to_q, space.data(), K, eps);
            turn_head<N>(row + H * K, gain_k, turn, to_k, space.data(), K, eps);
            for (long c = K; c < width; c++) to_q[c] = to_k[c] = 0.0f;
        }
        columns_of(k.data(), L, width, k_over.data(), line);
    }
    void score(long i, long keys, float* s) {
        scores(q.data() + i * width, width, k_over.data(), line, K, keys, s);
    }
};

}  // namespace
