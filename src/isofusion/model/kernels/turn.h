// QK-norm and RoPE of one head of one slot.

#pragma once

#include "vectors.h"

namespace {

// One head of one slot, normalised, times its gain and turned, filled up with zeros to whole vectors. N: its features, or
// 0 where they are not among BY_HEAD; x, g: space for K numbers.
#if defined(VECTORS512)
WITHIN __m512 neighbours(__m512 x) { return _mm512_permute_ps(x, 0xb1); }

template <long N, class Q>
WITHIN void turn_head(const Q* from, const float* gain, const float* phase, float* to, float*, long head, float eps) {
    const long K = N ? N : head;
    __m512 sum = _mm512_setzero_ps();
    for (long c = 0; c < K; c += LANES) {
        const __m512 x = some_of(from + c, K - c);
        sum = _mm512_fmadd_ps(x, x, sum);
    }
    const __m512 s = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(K) + eps));
    for (long c = 0; c < K; c += LANES) {
        const __m512 y = some_of(from + c, K - c) * (s * some_of(gain + c, K - c)), turn = some_of(phase + c, K - c);
        const __m512 across = neighbours(y) * _mm512_movehdup_ps(turn);
        _mm512_store_ps(to + c, _mm512_fmaddsub_ps(y, _mm512_moveldup_ps(turn), across));
    }
}

// Its gradient; adds to that of the gain.
template <long N, class Q>
WITHIN void turn_back(const float* grad, const Q* from, const float* gain, const float* phase, Q* to, float* to_gain, float*,
                      float* g, long head, float eps) {
    const long K = N ? N : head;
    __m512 sum = _mm512_setzero_ps(), along = sum;
    for (long c = 0; c < K; c += LANES) {
        const __m512 x = some_of(from + c, K - c), of = _mm512_load_ps(grad + c), turn = some_of(phase + c, K - c);
        const __m512 across = neighbours(of) * _mm512_movehdup_ps(turn);
        const __m512 back = _mm512_fmsubadd_ps(of, _mm512_moveldup_ps(turn), across);
        const __m512 weighed = back * some_of(gain + c, K - c);
        _mm512_store_ps(g + c, back);
        sum = _mm512_fmadd_ps(x, x, sum);
        along = _mm512_fmadd_ps(x, weighed, along);
    }
    const float s = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(K) + eps);
    const __m512 scale = _mm512_set1_ps(s), less = _mm512_set1_ps(_mm512_reduce_add_ps(along) * s * s / float(K));
    for (long c = 0; c < K; c += LANES) {
        const __m512 x = some_of(from + c, K - c), back = _mm512_load_ps(g + c);
        const __m512 gains = _mm512_fmadd_ps(back, x * scale, some_of(to_gain + c, K - c));
        _mm512_mask_storeu_ps(to_gain + c, first_of(K - c), gains);
        put(to + c, scale * (back * some_of(gain + c, K - c) - x * less), K - c);
    }
}
#else
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

// Its gradient; adds to that of the gain.
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
#endif

}  // namespace
