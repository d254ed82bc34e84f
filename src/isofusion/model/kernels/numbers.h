// Numbers and how work is shared: bf16, exp, sums, pieces of rows.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

template <class F>
WITHIN F all(float x) {  // a number, or a vector of it
    return F{} + x;
}

// exp(r) near 0.
template <class F>
WITHIN F exp_near(F r) {
    F p = all<F>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

// exp(x), relative error below 2e-7; 0 below -87 and infinite from 88.4, just inside of what float32 holds. NaN
// stays NaN, because every comparison with it is false. F: float, or a vector of them; U: unsigned, as wide.
template <class F, class U>
WITHIN F exp_as(F x) {
    const F hot = all<F>(89.0f), cold = all<F>(-87.0f);
    const F below = hot < x ? hot : x, z = cold > below ? cold : below;
    const F shifted = z * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    const F n = shifted - 12582912.0f;
    const F p = exp_near((z - n * 0.693359375f) + n * 2.12194440e-4f);
    U bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    F scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return below < cold ? F{} : p * scale;
}
WITHIN float exp_of(float x) { return exp_as<float, uint32_t>(x); }

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

}  // namespace
