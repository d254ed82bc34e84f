// Numbers and how work is shared: bf16, exp, sums, pieces of rows.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// What loops are made of must be inside them, or they are not vectorised; in large functions a compiler may think otherwise.
#define WITHIN inline __attribute__((always_inline))
// What is long enough to be called, and is then compiled the same wherever it is called from.
#define APART __attribute__((noinline))

struct bf16 {
    uint16_t bits;
};

WITHIN float load(const float* p) { return *p; }
WITHIN float load(const bf16* p) {
    const uint32_t bits = uint32_t(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
WITHIN void store(float* p, float x) { *p = x; }
WITHIN void store(bf16* p, float x) {  // NaNs of arithmetic have no low bits that could carry: they stay NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// exp(x), relative error below 2e-7; 0 below -87 and infinite from 88.4, just inside of what float32 holds. NaN
// stays NaN, because every comparison with it is false.
WITHIN float exp_of(float x) {
    const float below = 89.0f < x ? 89.0f : x, z = -87.0f > below ? -87.0f : below;
    const float shifted = z * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    const float n = shifted - 12582912.0f;
    const float r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return below < -87.0f ? 0.0f : p * scale;
}

struct Piece {
    long from, to;
};

// Piece p of the rows: there are as many as threads, however many of these the run time really gives.
inline Piece piece(long rows, int pieces, int p) {
    const long each = (rows + pieces - 1) / pieces, from = p * each < rows ? p * each : rows;
    return {from, from + each < rows ? from + each : rows};
}

inline int useful(long numbers, int threads) {  // waking a thread costs about what 8,192 numbers cost
    return numbers < 16384 ? 1 : threads;
}

constexpr long LANES = 16;

// Sum of x[i] * y[i]: 16 sums side by side, then halved four times (compilers add lanes up one after the other).
WITHIN float dot(const float* x, const float* y, long n) {
    float sums[LANES] = {};
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (long l = 0; l < LANES; l++) sums[l] += x[i + l] * y[i + l];
    for (long l = 0; i + l < n; l++) sums[l] += x[i + l] * y[i + l];
    for (long half = LANES / 2; half; half /= 2)
        for (long l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}

inline float scale_of(const float* x, long n, float eps) { return 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps); }

typedef float vec __attribute__((vector_size(4 * LANES)));

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
        std::memset(data(), 0, 4 * size_t(n));
    }

   private:
    static constexpr uintptr_t LINE = 4 * LANES;
    static uintptr_t first(const char* p) { return (reinterpret_cast<uintptr_t>(p) + LINE - 1) / LINE * LINE; }
};

WITHIN vec& at(float* p) { return *reinterpret_cast<vec*>(p); }
WITHIN const vec& at(const float* p) { return *reinterpret_cast<const vec*>(p); }
WITHIN long up(long n) { return (n + LANES - 1) / LANES * LANES; }

#if defined(__AVX512F__)
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
#else
inline void turn_over(const float* from, long next, float* to, long line) {
    for (int c = 0; c < LANES; c++)
        for (int i = 0; i < LANES; i++) to[c * line + i] = from[i * next + c];
}
#endif

}  // namespace
