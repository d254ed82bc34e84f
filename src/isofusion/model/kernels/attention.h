// Attention over documents, with QK-norm and RoPE.

#pragma once

#include "head.h"
#include "values.h"

namespace {

// Keys that queries i .. i + BLOCK of a document see: from its first to the last that any of them does.
inline long keys_of(const int32_t* last, long from, long i, long L) {
    long keys = 0;
    for (long b = i; b < i + BLOCK && b < L; b++) keys = std::max(keys, long(last[from + b]) - from + 1);
    return keys;
}

// Keys that each of them sees; those past the document's last slot see none.
inline void seen_by(const int32_t* last, long from, long i, long L, long* seen) {
    for (long b = 0; b < BLOCK; b++) seen[b] = i + b < L ? long(last[from + i + b]) - from + 1 : 0;
}

// Attention with QK-norm and RoPE over documents [edges[n], edges[n + 1]), which fill the slots: slot t sees those of its
// document up to last[t], itself among them and none past the document. qkv [T, 3, H, K] -> out [T, H, K] and logsumexp
// [T, H]. `phase`: K / 2 pairs of cosine and sine a slot, `stride` numbers apart. Each head of each document is one
// thread's: no result depends on their number.
template <long N, class Values, class Q>
void attention_of(const Q* qkv, const float* gain_q, const float* gain_k, const float* phase, const int64_t* edges,
                  const int32_t* last, Q* out, float* logsumexp, long documents, long H, long size, long stride, float eps,
                  int threads) {
    const long K = N ? N : size;
#pragma omp parallel num_threads(useful((edges[documents] - edges[0]) * H * K, threads))
    {
        Head head;
        Values by;
        Numbers s;
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < documents * H; unit++) {
            const long from = edges[unit / H], L = edges[unit / H + 1] - from, h = unit % H;
            head.template fill<N>(qkv, gain_q, gain_k, phase, stride, from, L, H, h, K, eps);
            by.values(head, qkv + ((from * 3 + 2) * H + h) * K, 3 * H * K);
            s.resize(BLOCK * head.line);
            for (long i = 0; i < L; i += BLOCK) {
                const long keys = keys_of(last, from, i, L);
                head.score(i, keys, s.data());
                long seen[BLOCK];
                float whole[BLOCK];
                seen_by(last, from, i, L, seen);
                softmax(s.data(), head.line, seen, up(keys), whole);
                for (long b = 0; b < BLOCK && i + b < L; b++) logsumexp[(from + i + b) * H + h] = whole[b];
                by.give(head, s.data(), i, keys, out + (from * H + h) * K, H * K);
            }
        }
    }
}

// The gradient of `attention`, with the weights computed again: to [T, 3, H, K], and of both gains.
template <long N, class Values, class Q>
void attention_back(const Q* grad, const Q* qkv, const float* gain_q, const float* gain_k, const float* phase,
                    const int64_t* edges, const int32_t* last, const float* logsumexp, Q* to, float* to_gain_q,
                    float* to_gain_k, long documents, long H, long size, long stride, float eps, int threads) {
    const long K = N ? N : size;
    std::vector<float> sums(documents * H * 2 * K, 0.0f);  // of the gains, by document and head
#pragma omp parallel num_threads(useful((edges[documents] - edges[0]) * H * K, threads))
    {
        Head head;
        Values by;
        Numbers p, s, space;
        space.resize(2 * up(K));
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < documents * H; unit++) {
            const long from = edges[unit / H], L = edges[unit / H + 1] - from, h = unit % H;
            head.template fill<N>(qkv, gain_q, gain_k, phase, stride, from, L, H, h, K, eps);
            by.gradient(head, qkv + ((from * 3 + 2) * H + h) * K, 3 * H * K, grad + (from * H + h) * K, H * K);
            p.resize(BLOCK * head.line);
            s.resize(BLOCK * head.line);
            float* gains = sums.data() + unit * 2 * K;
            const auto back = [&](const float* of, long i, int part, const float* gain) {
                const long row = (((from + i) * 3 + part) * H + h) * K;
                turn_back<N>(of, qkv + row, gain, phase + (from + i) * stride, to + row, gains + part * K, space.data(),
                             space.data() + up(K), K, eps);
            };
            for (long i = 0; i < L; i += BLOCK) {
                const long keys = keys_of(last, from, i, L);
                head.score(i, keys, p.data());
                by.of_weights(head, i, keys, s.data());
                long seen[BLOCK];
                float whole[BLOCK] = {};
                seen_by(last, from, i, L, seen);
                for (long b = 0; b < BLOCK && i + b < L; b++) whole[b] = logsumexp[(from + i + b) * H + h];
                softmax_back(p.data(), s.data(), head.line, seen, up(keys), whole);
                by.take(head, p.data(), s.data(), i, keys);
                for (long b = 0; b < BLOCK && i + b < L; b++) back(by.of_q.data() + b * head.width, i + b, 0, gain_q);
            }
            for (long i = 0; i < L; i++) {
                back(by.of_k.data() + i * head.width, i, 1, gain_k);
                for (long c = 0; c < K; c++)
                    store(to + (((from + i) * 3 + 2) * H + h) * K + c, by.of_v.data()[i * head.width + c]);
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

// The usual sizes of a head spelled out. Of a few features the products take no time, and their sums would lose digits.
#define BY_HEAD(function, Q, ...)                                      \
    switch (K) {                                                       \
        case 8: return function<8, Multiplied<Q>>(__VA_ARGS__);        \
        case 16: return function<16, Multiplied<Q>>(__VA_ARGS__);      \
        case 32: return function<32, Multiplied<Q>>(__VA_ARGS__);      \
        case 64: return function<64, Multiplied<Q>>(__VA_ARGS__);      \
        case 128: return function<128, Multiplied<Q>>(__VA_ARGS__);    \
        default:                                                       \
            if (K < 8) return function<0, Single<Q>>(__VA_ARGS__);     \
            return function<0, Multiplied<Q>>(__VA_ARGS__);            \
    }

}  // namespace
