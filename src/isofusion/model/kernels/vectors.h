// Sixteen numbers at once.

#pragma once

#include <algorithm>
#include <memory>
#include "numbers.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VECTORS512
#include <immintrin.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t vec_bits __attribute__((vector_size(4 * LANES)));

// exp of what is not above 0 by more than a rounding (NaN stays NaN), as exp_as; with AVX-512 down to the smallest numbers
// of float32.
WITHIN vec exp_of_negative(vec x) {
#if defined(VECTORS512)
    const __m512 z = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // of a NaN and a number the second
    const __m512 n = _mm512_roundscale_ps(z * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vec)_mm512_scalef_ps((__m512)exp_near((z - n * 0.693359375f) + n * 2.12194440e-4f), n);
#else
    return exp_as<vec, vec_bits>(x);
#endif
}

// log of normal numbers, relative error below 2e-7 from 1 on; NaN stays NaN. (Cephes' logf.)
WITHIN vec log_of(vec x) {
    vec_bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    vec m, power = __builtin_convertvector((bits >> 23) - 127u, vec);
    bits = (bits & 0x7fffffu) | 0x3f800000u;
    std::memcpy(&m, &bits, sizeof m);
    const vec root = all<vec>(1.41421356f);
    power = root < m ? power + 1.0f : power;
    m = (root < m ? m * 0.5f : m) - 1.0f;
    vec p = all<vec>(7.0376836292e-2f);
    for (const float next : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                             2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
        p = p * m + next;
    const vec square = m * m, log = p * m * square - power * 2.12194440e-4f - 0.5f * square + m + power * 0.693359375f;
    return x == x ? log : x;
}

// Of the sixteen numbers of a vector.
WITHIN float sum_of(const vec& x) {
    float sums[LANES];
    std::memcpy(sums, &x, sizeof x);
    for (long half = LANES / 2; half; half /= 2)
        for (long l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}
WITHIN float largest_of(const vec& x) {
    float top[LANES];
    std::memcpy(top, &x, sizeof x);
    for (long half = LANES / 2; half; half /= 2)
        for (long l = 0; l < half; l++) top[l] = top[l + half] > top[l] ? top[l + half] : top[l];
    return top[0];
}

// Numbers that begin with a cache line, as a vec must. What was in them is lost by either call.
class Numbers {
    std::unique_ptr<char[]> all;
    size_t room = 0;

   public:
    float* data() { return reinterpret_cast<float*>(first(all.get())); }
    uint32_t* pairs() { return reinterpret_cast<uint32_t*>(first(all.get())); }
    void resize(long n) {  // not cleared: for most of a product's factors that would be a pass over memory
        const size_t bytes = 4 * size_t(n);
        if (bytes <= room) return;
        all.reset(new char[bytes + LINE]);
        room = bytes;
    }
    void zeros(long n) {
        resize(n);
        std::fill_n(data(), n, 0.0f);
    }

   private:
    static constexpr uintptr_t LINE = 4 * LANES;
    static uintptr_t first(const char* p) { return (reinterpret_cast<uintptr_t>(p) + LINE - 1) / LINE * LINE; }
};

WITHIN vec& at(float* p) { return *reinterpret_cast<vec*>(p); }
WITHIN const vec& at(const float* p) { return *reinterpret_cast<const vec*>(p); }
WITHIN long up(long n) { return (n + LANES - 1) / LANES * LANES; }

#if defined(VECTORS512)
// 16 x 16 numbers: rows become columns.
inline void turn_over(__m512i* r) {
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int h = 0; h < 2; h++) {
            r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + h + 2]);
            r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + h + 2]);
        }
    for (int half = 0; half < LANES; half += 8)  // r[4 i + k] now holds columns k, 4 + k, 8 + k, 12 + k of rows 4 i to 4 i + 3
        for (int k = 0; k < 4; k++) {
            t[half + k] = _mm512_shuffle_i32x4(r[half + k], r[half + 4 + k], 0x88);
            t[half + 4 + k] = _mm512_shuffle_i32x4(r[half + k], r[half + 4 + k], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        r[k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0x88);
        r[8 + k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0xdd);
    }
}

inline void turn_over(const float* from, long next, float* to, long line) {
    __m512i r[LANES];
    for (int i = 0; i < LANES; i++) r[i] = _mm512_loadu_si512(from + i * next);
    turn_over(r);
    for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + i * line, r[i]);
}

WITHIN __mmask16 first_of(long count) { return __mmask16(count >= LANES ? 0xffff : count > 0 ? (1u << count) - 1 : 0); }

// The first `count` of sixteen numbers, zeros for the others.
WITHIN __m512 some_of(const float* x, long count) { return _mm512_maskz_loadu_ps(first_of(count), x); }
WITHIN __m512i bits_of(const bf16* x, long count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of(count), x));
}
WITHIN __m512 some_of(const bf16* x, long count) { return (__m512)_mm512_slli_epi32(bits_of(x, count), 16); }

// The first `count` of sixteen numbers are written.
WITHIN void put(float* to, __m512 x, long count) {
    if (count >= LANES)
        _mm512_storeu_ps(to, x);
    else
        _mm512_mask_storeu_ps(to, first_of(count), x);
}
WITHIN void put(bf16* to, __m512 x, long count) {
#if defined(__AVX512BF16__)
    const __m256i low = (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
    if (count >= LANES)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
    else
        _mm256_mask_storeu_epi16(to, first_of(count), low);
}
#else
inline void turn_over(const float* from, long next, float* to, long line) {
    for (int c = 0; c < LANES; c++)
        for (int i = 0; i < LANES; i++) to[c * line + i] = from[i * next + c];
}
#endif

}  // namespace
