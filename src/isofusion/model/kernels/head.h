// One head of one document: QK-norm, RoPE, scores and their softmax, in float32.

#pragma once

#include <algorithm>
#include "turn.h"

namespace {

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

// Scores from `seen` on are those of nobody.
WITHIN void hide(float* row, long seen, long end) {
    for (long j = seen / LANES * LANES; j < end; j += LANES)
        for (long l = 0; l < LANES; l++) row[j + l] = j + l < seen ? row[j + l] : -INFINITY;
}

// Row b of scores becomes their softmax over the first seen[b] of them, and zeros up to `end`, a multiple of LANES.
APART void softmax(float* s, long line, const long* seen, long end, float* logsumexp) {
    vec sums[BLOCK], all_sums = all<vec>(1.0f);
    float top[BLOCK];
    for (int b = 0; b < BLOCK; b++) {
        float* row = s + b * line;
        hide(row, seen[b], end);
        vec tops = at(row);
        for (long j = LANES; j < end; j += LANES) tops = at(row + j) > tops ? at(row + j) : tops;
        top[b] = seen[b] ? largest_of(tops) : 0.0f;
    }
    for (int b = 0; b < BLOCK; b++) {
        sums[b] = vec{};
        for (long j = 0; j < end; j += LANES) sums[b] += at(s + b * line + j) = exp_of_negative(at(s + b * line + j) - top[b]);
    }
    for (int b = 0; b < BLOCK; b++) {
        const float sum = seen[b] ? sum_of(sums[b]) : 1.0f, share = 1.0f / sum;
        for (long j = 0; j < end; j += LANES) at(s + b * line + j) *= share;
        all_sums[b] = sum;
    }
    const vec logs = log_of(all_sums);
    for (int b = 0; b < BLOCK; b++) logsumexp[b] = top[b] + logs[b];
}

// Scores become weights again, and the gradient `of` the weights becomes that of the scores.
APART void softmax_back(float* s, float* of, long line, const long* seen, long end, const float* logsumexp) {
    vec sums[BLOCK];
    for (int b = 0; b < BLOCK; b++) {
        float *row = s + b * line, *other = of + b * line;
        hide(row, seen[b], end);
        sums[b] = vec{};
        for (long j = 0; j < end; j += LANES) {
            at(row + j) = exp_of_negative(at(row + j) - logsumexp[b]);
            sums[b] += at(row + j) * at(other + j);
        }
    }
    for (int b = 0; b < BLOCK; b++) {
        const float along = sum_of(sums[b]);
        for (long j = 0; j < end; j += LANES) at(of + b * line + j) = at(s + b * line + j) * (at(of + b * line + j) - along);
    }
}

// One head of one document: q and k in float32, normalised and turned, and k turned over. Rows are filled up with zeros to
// whole vectors, and followed by rows of zeros, for the last BLOCK and the last vector of keys.
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
#if !defined(VECTORS512)
            for (long c = K; c < width; c++) to_q[c] = to_k[c] = 0.0f;
#endif
        }
        columns_of(k.data(), L, width, k_over.data(), line);
    }
    void score(long i, long keys, float* s) {
        scores(q.data() + i * width, width, k_over.data(), line, K, keys, s);
    }
};

}  // namespace
