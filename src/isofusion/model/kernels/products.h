// Matrix products, on processors with avx512_bf16.

#pragma once

#if defined(__AVX512BF16__)
#include <algorithm>
#include <type_traits>
#include <utility>
#include "vectors.h"

namespace {

// Matrix products of bf16 rows with float32 weights (rounded to bf16 on the way), float32 sums. Rows come in groups: those
// of group e, [edges[e], edges[e + 1]), meet weight e; a plain linear layer has one group. A library multiplies large
// matrices as fast, but wants the weights rounded beforehand and some 15 us more a call, which at the widths of the
// miniature, or with the few rows of an expert, is most of the time.
//
// Two bf16 numbers that stand behind each other in the summed dimension are a pair, one uint32: dpbf16 multiplies sixteen
// pairs and adds up both products. 64 columns of the right factor are packed as pairs, then met by all rows.

constexpr long PANEL = 4 * LANES;  // columns that are packed together
constexpr int TALL = 6;            // rows of a tile: 6 x 4 vectors of sums, 4 of the panel, 1 of the left factor

// The processor foresees what is read line after line of a few rows; weights are read as pieces of many.
constexpr long AHEAD = 8;
inline void ask_for(const float* x) { _mm_prefetch(reinterpret_cast<const char*>(x), _MM_HINT_T0); }

inline __m512i halves(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }  // 16 bf16, then 16

// Sixteen pairs (first[j], second[j]).
inline __m512i pairs_of(__m512 first, __m512 second) {
    alignas(64) static const uint16_t turns[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(turns), halves(first, second));
}

// How the left factor stands in memory: row after row, or pair after pair.
struct ByRows {
    long line;
    WITHIN long operator()(long i, long p) const { return i * line + p; }
};
struct ByPairs {
    long line;
    WITHIN long operator()(long i, long p) const { return p * line + i; }
};
struct ByBlocks {
    WITHIN long operator()(long i, long p) const { return p * LANES + i; }
};

// f(0), f(1) and so on, written out: sums that a loop might index are kept in memory.
template <class F, int... I>
WITHIN void each_of(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int M, class F>
WITHIN void each(F f) {
    each_of(f, std::make_integer_sequence<int, M>());
}
#define FOR_EACH(i, M, ...) each<M>([&](auto i) __attribute__((always_inline)) __VA_ARGS__)

// c[i * line + j * step] = sum over pairs of a[i] * panel[j], for M rows, of which `valid` are stored, and V vectors of
// columns, W of which stand behind each other in the panel. The pair p of row i is a[at(i, p)]. `step` 0: whole vectors that
// go past the caches. ADD: to `plus`, whose rows are as far apart.
template <int M, int V, int W = PANEL, bool ADD = false, class At, class C>
inline void tile(const uint32_t* a, At at, const uint32_t* panel, long pairs, C* c, long line, long step, long columns,
                 long valid = M, const float* plus = nullptr) {
    __m512 sums[M][V];
    FOR_EACH(i, M, {
        FOR_EACH(v, V, {
            if constexpr (ADD)
                sums[i][v] = some_of(plus + i * line + v * LANES, i < valid ? columns - v * LANES : 0);
            else
                sums[i][v] = _mm512_setzero_ps();
        });
    });
    for (long p = 0; p < pairs; p++) {
        __m512i right[V];
        FOR_EACH(v, V, { right[v] = _mm512_load_si512(panel + p * W + v * LANES); });
        FOR_EACH(i, M, {
            const __m512i left = _mm512_set1_epi32(int(a[at(i, p)]));
            FOR_EACH(v, V, { sums[i][v] = _mm512_dpbf16_ps(sums[i][v], (__m512bh)left, (__m512bh)right[v]); });
        });
    }
    FOR_EACH(i, M, {
        if (i >= valid) return;
        C* to = c + i * line;
        if (step == 1) FOR_EACH(v, V, { put(to + v * LANES, sums[i][v], columns - v * LANES); });
        if constexpr (std::is_same<C, float>::value) {
            if (step == 0) FOR_EACH(v, V, { _mm512_stream_ps(to + v * LANES, sums[i][v]); });
            if (step > 1) {
                alignas(64) float out[V * LANES];
                FOR_EACH(v, V, { _mm512_store_ps(out + v * LANES, sums[i][v]); });
                for (long j = 0; j < columns; j++) to[j * step] = out[j];
            }
        }
    });
}

// Rows of a plain matrix, `pairs` numbers each.
template <int V, bool ADD, class C>
void by_rows(const uint32_t* a, const uint32_t* panel, long pairs, C* c, long line, long columns, long rows, const float* plus) {
    const ByRows at{pairs};
    const auto some = [&](auto count, long i) {
        constexpr int M = decltype(count)::value;
        tile<M, V, PANEL, ADD>(a + i * pairs, at, panel, pairs, c + i * line, line, 1, columns, M, plus + (ADD ? i * line : 0));
    };
    long i = 0;
    for (; i + TALL <= rows; i += TALL) some(std::integral_constant<int, TALL>(), i);
    for (; i + 2 <= rows; i += 2) some(std::integral_constant<int, 2>(), i);
    if (i < rows) some(std::integral_constant<int, 1>(), i);
}

// Rows in blocks of LANES, pair after pair in a block: tiles of 6, 6 and 4 rows.
template <int V>
void by_blocks(const uint32_t* a, const uint32_t* panel, long pairs, float* c, long line, long step, long columns, long rows) {
    for (long i = 0; i < rows; i += LANES, a += pairs * LANES, c += LANES * line) {
        const auto some = [&](auto count, int from) {
            constexpr int M = decltype(count)::value;
            const long valid = std::min(long(M), rows - i - from);
            if (valid > 0) tile<M, V>(a + from, ByBlocks(), panel, pairs, c + from * line, line, step, columns, valid);
        };
        some(std::integral_constant<int, TALL>(), 0);
        some(std::integral_constant<int, TALL>(), TALL);
        some(std::integral_constant<int, LANES - 2 * TALL>(), 2 * TALL);
    }
}

#define BY_VECTORS(function, columns, ...)                        \
    switch (up(columns) / LANES) {                                \
        case 1: function<1>(__VA_ARGS__); break;                  \
        case 2: function<2>(__VA_ARGS__); break;                  \
        case 3: function<3>(__VA_ARGS__); break;                  \
        default: function<4>(__VA_ARGS__);                        \
    }

template <int V, class F>
inline void some_vectors(F f) {
    f(std::integral_constant<int, V>());
}

// The work of a product: for each group its panels of columns, and these in `parts` shares of the left factor's rows.
struct Work {
    long panels, parts, tasks;

    Work(long groups, long columns, long rows, int threads) {
        panels = (columns + PANEL - 1) / PANEL;
        parts = std::max(1L, std::min(4 * threads / std::max(1L, groups * panels), rows / (8 * TALL)));
        tasks = groups * panels * parts;
    }
    long group(long task) const { return task / parts / panels; }
    long column(long task) const { return task / parts % panels * PANEL; }
    Piece share(long task, long rows) const { return piece(rows, int(parts), int(task % parts)); }
};

// x [G, D] times a right factor [D, F] of its group -> out [G, F], ADD: and `plus` [G, F]; pack(e, from, columns, panel)
// packs columns of the factor.
template <bool ADD = false, class C, class Pack>
void rows_times(const bf16* x, const int64_t* edges, C* out, long E, long D, long F, int threads, Pack pack,
                const float* plus = nullptr) {
    const Work work(E, F, edges[E] - edges[0], threads);
#pragma omp parallel num_threads(useful((edges[E] - edges[0]) * F, threads))
    {
        Numbers space;
        space.resize(D / 2 * PANEL);
        uint32_t* panel = space.pairs();
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < work.tasks; task++) {
            const long e = work.group(task), from = work.column(task), columns = std::min(PANEL, F - from);
            const Piece rows = work.share(task, edges[e + 1] - edges[e]);
            if (rows.from == rows.to) continue;
            pack(e, from, columns, panel);
            const long top = edges[e] + rows.from;
            const uint32_t* a = reinterpret_cast<const uint32_t*>(x + top * D);
            const auto some = [&](auto vectors) {
                by_rows<decltype(vectors)::value, ADD>(a, panel, D / 2, out + top * F + from, F, columns, rows.to - rows.from,
                                                       plus + (ADD ? top * F + from : 0));
            };
            BY_VECTORS(some_vectors, columns, some)
        }
    }
}

// x [G, D] times weight [E, D, F] -> out [G, F]. D is even.
void product(const bf16* x, const float* weight, const int64_t* edges, bf16* out, long E, long D, long F, int threads) {
    rows_times(x, edges, out, E, D, F, threads, [=](long e, long from, long columns, uint32_t* panel) {
        const float* w = weight + e * D * F + from;
        for (long p = 0; p < D / 2; p++) {
            const float *first = w + 2 * p * F, *second = first + F;
            for (long j = 0; j < PANEL; j += LANES) {
                ask_for(first + AHEAD * F + j);
                ask_for(second + AHEAD * F + j);
                const __m512 low = some_of(first + j, columns - j), high = some_of(second + j, columns - j);
                _mm512_store_si512(panel + p * PANEL + j, pairs_of(low, high));
            }
        }
    });
}

// x [G, F] times the transpose of weight [E, D, F] -> out [G, D], ADD: and `plus` [G, D]. F is even.
template <bool ADD = false, class C>
void product_transposed(const bf16* x, const float* weight, const int64_t* edges, C* out, long E, long D, long F, int threads,
                        const float* plus = nullptr) {
    const auto pack = [=](long e, long from, long columns, uint32_t* panel) {
        const float* w = weight + (e * D + from) * F;
        for (long j = 0; j < PANEL; j += LANES)  // sixteen pairs of sixteen columns at a time
            for (long p = 0; p < F / 2; p += LANES) {
                __m512i some[LANES];
                for (long i = 0; i < LANES; i++) {
                    const float* of = w + (j + i) * F + 2 * p;
                    const long count = j + i < columns ? F - 2 * p : 0;
                    ask_for(of + AHEAD * LANES);
                    ask_for(of + (AHEAD + 1) * LANES);
                    some[i] = halves(some_of(of, count), some_of(of + LANES, count - LANES));
                }
                turn_over(some);
                for (long q = 0; q < std::min(LANES, F / 2 - p); q++)
                    _mm512_store_si512(panel + (p + q) * PANEL + j, some[q]);
            }
    };
    rows_times<ADD>(x, edges, out, E, F, D, threads, pack, plus);
}

// Rows 0 and 1, 2 and 3 and so on as pairs, W of them one after another; those past `count` rows or columns are zeros.
template <long W = LANES>
inline void pair_up(const bf16* from, long next, long count, long columns, long pairs, uint32_t* to) {
    for (long p = 0; p < pairs; p++, from += 2 * next, to += W)
        for (long j = 0; j < W; j += LANES) {
            const __m512i low = bits_of(from + j, 2 * p < count ? columns - j : 0);
            const __m512i high = bits_of(from + next + j, 2 * p + 1 < count ? columns - j : 0);
            _mm512_store_si512(to + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

// The transpose of x [G, D] times y [G, F], group by group -> out [E, D, F], float32; `turned`: [E, F, D].
void sums_of_rows(const bf16* x, const bf16* y, const int64_t* edges, float* out, long E, long D, long F, bool turned,
                  int threads) {
    // what no cache holds until the optimizer reads it would be read from memory to be written over
    const bool past = E * D * F > (1 << 21) && F % LANES == 0 && reinterpret_cast<uintptr_t>(out) % (4 * LANES) == 0;
    const long line = turned ? 1 : F, step = turned ? D : past ? 0 : 1;
    const Work work(E, F, D, threads);
    const long blocks = up(D) / LANES;
    std::vector<long> start(E + 1, 0);
    long most = 0;
    for (long e = 0; e < E; e++) {
        most = std::max(most, edges[e + 1] - edges[e]);
        start[e + 1] = start[e] + (edges[e + 1] - edges[e] + 1) / 2;
    }
    Numbers left;  // x as pairs of rows, group after group, block after block
    left.resize(start[E] * blocks * LANES);
#pragma omp parallel num_threads(useful((edges[E] - edges[0]) * F, threads))
    {
        Numbers space;
        space.resize((most + 1) / 2 * PANEL);
        uint32_t* panel = space.pairs();
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < E * blocks; task++) {
            const long e = task / blocks, from = task % blocks * LANES, count = std::min(LANES, D - from);
            const long rows = edges[e + 1] - edges[e], pairs = (rows + 1) / 2;
            uint32_t* to = left.pairs() + (start[e] * blocks + task % blocks * pairs) * LANES;
            const bf16* first = x + edges[e] * D + from;
            pair_up(first, D, rows, count, pairs, to);
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < work.tasks; task++) {
            const long e = work.group(task), from = work.column(task), columns = std::min(PANEL, F - from);
            const long rows = edges[e + 1] - edges[e], pairs = (rows + 1) / 2;
            const Piece share = work.share(task, blocks);
            pair_up<PANEL>(y + edges[e] * F + from, F, rows, columns, pairs, panel);
            const uint32_t* a = left.pairs() + (start[e] * blocks + share.from * pairs) * LANES;
            const long top = share.from * LANES, height = std::min(D, share.to * LANES) - top;
            float* to = out + e * D * F + top * line + from * (turned ? step : 1);
            BY_VECTORS(by_blocks, columns, a, panel, pairs, to, line, step, columns, height)
            if (past) _mm_sfence();
        }
    }
}

// The same as [E, D, F]. The left factor is read again for every panel of the right one: of a head it must not be the
// gradient of the logits, though storing what comes out turned over costs too.
void product_of_rows(const bf16* x, const bf16* y, const int64_t* edges, float* out, long E, long D, long F, int threads) {
    if (D < 8 * F)
        sums_of_rows(x, y, edges, out, E, D, F, false, threads);
    else
        sums_of_rows(y, x, edges, out, E, F, D, true, threads);
}

}  // namespace

#endif
