// Attention over documents, with QK-norm and RoPE.

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
constexpr int WIDE = 4;   // vectors of a row that are summed up at once

// s[b][j] = sum over c of q[b][c] * turned[c][j], for J vectors of keys. q: rows of `width`; turned, s: rows of `line`.
template <int J>
inline void scores_of(const float* q, long width, const float* turned, long line, long K, float* s) {
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

// to[b] = sum over keys of p[b][j] * rows[j], for V vectors of a row.
template <int V>
inline void weighted_of(const float* p, long line, const float* rows, long width, long keys, float* to) {
    vec sums[BLOCK][V] = {};
    for (long j = 0; j < keys; j++)
        for (int v = 0; v < V; v++) {
            const vec row = at(rows + j * width + v * LANES);
            for (int b = 0; b < BLOCK; b++) sums[b][v] += p[b * line + j] * row;
        }
    for (int b = 0; b < BLOCK; b++)
        for (int v = 0; v < V; v++) at(to + b * width + v * LANES) = sums[b][v];
}

inline void weighted(const float* p, long line, const float* rows, long width, long keys, float* to) {
    long c = 0;
    for (; c + WIDE * LANES <= width; c += WIDE * LANES) weighted_of<WIDE>(p, line, rows + c, width, keys, to + c);
    for (; c < width; c += LANES) weighted_of<1>(p, line, rows + c, width, keys, to + c);
}

// to[j] += sum over queries of p[b][j] * rows[b], for V vectors of a row.
template <int V>
inline void spread_of(const float* p, long line, const float* rows, long width, long keys, float* to) {
    vec row[BLOCK][V];
    for (int b = 0; b < BLOCK; b++)
        for (int v = 0; v < V; v++) row[b][v] = at(rows + b * width + v * LANES);
    for (long j = 0; j < keys; j++)
        for (int v = 0; v < V; v++) {
            vec sum = at(to + j * width + v * LANES);
            for (int b = 0; b < BLOCK; b++) sum += p[b * line + j] * row[b][v];
            at(to + j * width + v * LANES) = sum;
        }
}

inline void spread(const float* p, long line, const float* rows, long width, long keys, float* to) {
    long c = 0;
    for (; c + WIDE * LANES <= width; c += WIDE * LANES) spread_of<WIDE>(p, line, rows + c, width, keys, to + c);
    for (; c < width; c += LANES) spread_of<1>(p, line, rows + c, width, keys, to + c);
}

// One head of one document in float32: rows of q, k, v, and k and v turned over; filled up with zeros to whole vectors.
struct Head {
    long line, width;
    Numbers q, k, v, k_over, v_over, space;

    template <long N, class Q>
    void fill(const Q* qkv, const float* gain_q, const float* gain_k, const float* phase, long stride, long from, long L,
              long H, long h, long size, float eps, bool backward) {
        const long K = N ? N : size;
        line = up(L) | LANES;  // an odd number of cache lines: columns do not fall into the same few sets of a cache
        width = up(K);
        const long rows = L + BLOCK;
        q.zeros(rows * width);
        k.zeros(rows * width);
        v.zeros(rows * width);
        k_over.zeros(K * line);
        if (backward) v_over.zeros(K * line);
        space.resize(K);
        for (long i = 0; i < L; i++) {
            const Q* row = qkv + ((from + i) * 3 * H + h) * K;
            const float* turn = phase + (from + i) * stride;
            turn_head<N>(row, gain_q, turn, q.data() + i * width, space.data(), K, eps);
            turn_head<N>(row + H * K, gain_k, turn, k.data() + i * width, space.data(), K, eps);
            float *keys = k.data() + i * width, *values = v.data() + i * width;
            for (long c = 0; c < K; c++) values[c] = load(row + 2 * H * K + c);
            for (long c = 0; c < K; c++) k_over.data()[c * line + i] = keys[c];
            if (backward)
                for (long c = 0; c < K; c++) v_over.data()[c * line + i] = values[c];
        }
    }
};

// Keys that queries i .. i + BLOCK of a document see: from its first to the last that any of them does.
inline long keys_of(const int32_t* last, long from, long i, long L) {
    long keys = 0;
    for (long b = i; b < i + BLOCK && b < L; b++) keys = std::max(keys, long(last[from + b]) - from + 1);
    return keys;
}

// Attention with QK-norm and RoPE over documents [edges[n], edges[n + 1]), which fill the slots: slot t sees those of its
// document up to last[t]. qkv [T, 3, H, K] -> out [T, H, K] and logsumexp [T, H]. `phase`: K / 2 pairs of cosine and
// sine a slot, `stride` numbers apart. Each head of each document is one thread's: no result depends on their number.
template <long N, class Q>
void attention_of(const Q* qkv, const float* gain_q, const float* gain_k, const float* phase, const int64_t* edges,
               const int32_t* last, Q* out, float* logsumexp, long documents, long H, long size, long stride, float eps, int threads) {
    const long K = N ? N : size;
#pragma omp parallel num_threads(useful((edges[documents] - edges[0]) * H * K, threads))
    {
        Head head;
        Numbers s, result;
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < documents * H; unit++) {
            const long from = edges[unit / H], L = edges[unit / H + 1] - from, h = unit % H;
            head.template fill<N>(qkv, gain_q, gain_k, phase, stride, from, L, H, h, K, eps, false);
            const long line = head.line, width = head.width;
            s.resize(BLOCK * line);
            result.resize(BLOCK * width);
            for (long i = 0; i < L; i += BLOCK) {
                const long keys = keys_of(last, from, i, L);
                scores(head.q.data() + i * width, width, head.k_over.data(), line, K, keys, s.data());
                for (long b = 0; b < BLOCK; b++) {
                    float* row = s.data() + b * line;
                    const long seen = i + b < L ? long(last[from + i + b]) - from + 1 : 0;
                    float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
                    for (long j = 0; j < seen; j++) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
                    for (long j = 0; j < seen; j++) sum += row[j] = exp_of(row[j] - top);
                    for (long j = seen; j < keys; j++) row[j] = 0.0f;
                    if (!seen) continue;
                    const float share = 1.0f / sum;
                    for (long j = 0; j < seen; j++) row[j] *= share;
                    logsumexp[(from + i + b) * H + h] = top + std::log(sum);
                }
                weighted(s.data(), line, head.v.data(), width, keys, result.data());
                for (long b = 0; b < BLOCK && i + b < L; b++)
                    for (long c = 0; c < K; c++) store(out + ((from + i + b) * H + h) * K + c, result.data()[b * width + c]);
            }
        }
    }
}

// The gradient of `attention`, with the weights computed again: to [T, 3, H, K], and of both gains.
template <long N, class Q>
void attention_back(const Q* grad, const Q* qkv, const float* gain_q, const float* gain_k, const float* phase,
                        const int64_t* edges, const int32_t* last, const float* logsumexp, Q* to, float* to_gain_q,
                        float* to_gain_k, long documents, long H, long size, long stride, float eps, int threads) {
    const long K = N ? N : size;
    std::vector<float> sums(documents * H * 2 * K, 0.0f);  // of the gains, by document and head
#pragma omp parallel num_threads(useful((edges[documents] - edges[0]) * H * K, threads))
    {
        Head head;
        Numbers p, s, of_out, of_q, of_k, of_v;
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < documents * H; unit++) {
            const long from = edges[unit / H], L = edges[unit / H + 1] - from, h = unit % H;
            head.template fill<N>(qkv, gain_q, gain_k, phase, stride, from, L, H, h, K, eps, true);
            const long line = head.line, width = head.width;
            p.resize(BLOCK * line);
            s.resize(BLOCK * line);
            of_q.resize(BLOCK * width);
            of_k.zeros(L * width);
            of_v.zeros(L * width);
            of_out.zeros((L + BLOCK) * width);
            for (long i = 0; i < L; i++)
                for (long c = 0; c < K; c++) of_out.data()[i * width + c] = load(grad + ((from + i) * H + h) * K + c);
            float* gains = sums.data() + unit * 2 * K;
            std::vector<float> space(2 * K);
            const auto back = [&](const float* of, long i, int part, const float* gain) {
                const long row = (((from + i) * 3 + part) * H + h) * K;
                turn_back<N>(of, qkv + row, gain, phase + (from + i) * stride, to + row, gains + part * K, space.data(),
                          space.data() + K, K, eps);
            };
            for (long i = 0; i < L; i += BLOCK) {
                const long keys = keys_of(last, from, i, L);
                scores(head.q.data() + i * width, width, head.k_over.data(), line, K, keys, p.data());
                scores(of_out.data() + i * width, width, head.v_over.data(), line, K, keys, s.data());
                for (long b = 0; b < BLOCK; b++) {
                    float *weight = p.data() + b * line, *of = s.data() + b * line;
                    const long seen = i + b < L ? long(last[from + i + b]) - from + 1 : 0;
                    const float whole = seen ? logsumexp[(from + i + b) * H + h] : 0.0f;
#pragma omp simd
                    for (long j = 0; j < seen; j++) weight[j] = exp_of(weight[j] - whole);
                    const float along = dot(weight, of, seen);
#pragma omp simd
                    for (long j = 0; j < seen; j++) of[j] = weight[j] * (of[j] - along);
                    for (long j = seen; j < keys; j++) weight[j] = of[j] = 0.0f;
                }
                weighted(s.data(), line, head.k.data(), width, keys, of_q.data());
                spread(s.data(), line, head.q.data() + i * width, width, keys, of_k.data());
                spread(p.data(), line, of_out.data() + i * width, width, keys, of_v.data());
                for (long b = 0; b < BLOCK && i + b < L; b++) back(of_q.data() + b * width, i + b, 0, gain_q);
            }
            for (long i = 0; i < L; i++) {
                back(of_k.data() + i * width, i, 1, gain_k);
                for (long c = 0; c < K; c++) store(to + (((from + i) * 3 + 2) * H + h) * K + c, of_v.data()[i * width + c]);
            }
        }
    }
    for (long i = 0; i < K; i++) to_gain_q[i] = to_gain_k[i] = 0.0f;
    for (long unit = 0; unit < documents * H; unit++)
        for (long i = 0; i < K; i++) {
            to_gain_q[i] += sums[unit * 2 * K + i];
            to_gain_k[i] += sums[unit * 2 * K + K + i];
        }
}

// The usual sizes of a head spelled out.
#define BY_HEAD(function, ...)                       \
    switch (K) {                                     \
        case 8: return function<8>(__VA_ARGS__);     \
        case 16: return function<16>(__VA_ARGS__);   \
        case 32: return function<32>(__VA_ARGS__);   \
        case 64: return function<64>(__VA_ARGS__);   \
        case 128: return function<128>(__VA_ARGS__); \
        default: return function<0>(__VA_ARGS__);    \
    }

}  // namespace
