// What the weights of attention's softmax are multiplied with: in float32, or in bf16.

#pragma once

#include "head.h"
#include "products.h"

namespace {

constexpr int WIDE = 4;  // vectors of a row that are summed up at once

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

// What the weights of one head of one document are multiplied with, in float32. `next`: from one slot to the next.
template <class Q>
struct Single {
    Numbers v, v_over, of_out, result, of_q, of_k, of_v;

    static void rows_of(const Q* from, long next, const Head& head, Numbers& to) {
        to.zeros((up(head.L) + LANES) * head.width);
        for (long i = 0; i < head.L; i++)
            for (long c = 0; c < head.K; c++) to.data()[i * head.width + c] = load(from + i * next + c);
    }
    void values(Head& head, const Q* from, long next) {
        rows_of(from, next, head, v);
        result.resize(BLOCK * head.width);
    }
    // Rows i .. i + BLOCK of the result, from rows of weights.
    void give(Head& head, const float* p, long i, long keys, Q* out, long next) {
        weighted(p, head.line, v.data(), head.width, keys, result.data());
        for (long b = 0; b < BLOCK && i + b < head.L; b++)
            for (long c = 0; c < head.K; c++) store(out + (i + b) * next + c, result.data()[b * head.width + c]);
    }

    void gradient(Head& head, const Q* from, long next, const Q* grad, long grad_next) {
        rows_of(from, next, head, v);
        rows_of(grad, grad_next, head, of_out);
        v_over.resize(head.width * head.line);
        columns_of(v.data(), head.L, head.width, v_over.data(), head.line);
        of_q.resize(BLOCK * head.width);
        of_k.zeros(head.L * head.width);
        of_v.zeros(head.L * head.width);
    }
    void of_weights(Head& head, long i, long keys, float* s) {
        scores(of_out.data() + i * head.width, head.width, v_over.data(), head.line, head.K, keys, s);
    }
    // Rows of weights and of the gradient of their scores: that of q is then in of_q, those of k and v grow.
    void take(Head& head, const float* p, const float* s, long i, long keys) {
        const long line = head.line, width = head.width;
        weighted(s, line, head.k.data(), width, keys, of_q.data());
        spread(s, line, head.q.data() + i * width, width, keys, of_k.data());
        spread(p, line, of_out.data() + i * width, width, keys, of_v.data());
    }
};

#if defined(__AVX512BF16__)

// The five of attention's seven products that weights or their gradients take part in, with these rounded to bf16 and
// sums in float32: twice as fast. Scores stay float32 (head.h): a large gain of QK-norm would magnify their rounding.
struct Paired {
    static constexpr long QUERIES = 4 * BLOCK;  // as many are summed up before the gradients of k and v are read again
    Numbers v, v_over, k, of_out, rows, p_pairs, s_pairs, q_pairs, out_pairs, of_q, of_k, of_v;
    long first = 0, count = 0, most = 0;  // queries in p_pairs and s_pairs, and the keys they see

    // Pairs of rows, 64 columns after 64, each as many as fill whole vectors.
    static void pair_up(const bf16* from, long next, long count, long K, long pairs, uint32_t* to) {
        for (long c = 0; c < K; c += PANEL) {
            const long columns = std::min(PANEL, K - c);
            BY_VECTORS(pair_panel, columns, from + c, next, count, columns, pairs, to + c * pairs)
        }
    }
    template <int V>
    static void pair_panel(const bf16* from, long next, long count, long columns, long pairs, uint32_t* to) {
        ::pair_up<V * LANES>(from, next, count, columns, pairs, to);
    }
    static void pair_up(const float* from, long width, long K, long pairs, uint32_t* to) {  // rows filled up with zeros
        for (long c = 0; c < K; c += PANEL) {
            const long wide = std::min(PANEL, width - c);
            for (long p = 0; p < pairs; p++)
                for (long j = 0; j < wide; j += LANES) {
                    const float* first = from + 2 * p * width + c + j;
                    const __m512 low = _mm512_load_ps(first), high = _mm512_load_ps(first + width);
                    _mm512_store_si512(to + c * pairs + p * wide + j, pairs_of(low, high));
                }
        }
    }
    // Pairs of features, turned over: 64 keys after 64.
    static void turn_pairs(const bf16* from, long next, long L, long K, uint32_t* to) {
        for (long j = 0; j < L; j += LANES)
            for (long c = 0; c < K / 2; c += LANES) {
                __m512i some[LANES];
                for (long i = 0; i < LANES; i++)
                    some[i] = _mm512_maskz_loadu_epi32(j + i < L ? first_of(K / 2 - c) : 0, from + (j + i) * next + 2 * c);
                turn_over(some);
                uint32_t* panel = to + j / PANEL * PANEL * (K / 2) + j % PANEL;
                for (long q = 0; q < std::min(LANES, K / 2 - c); q++) _mm512_store_si512(panel + (c + q) * PANEL, some[q]);
            }
    }
    // Float rows i .. i + BLOCK, one after another: pairs along a row.
    uint32_t* along_rows(const float* x, long line, long keys) {
        for (long b = 0; b < BLOCK; b++)
            for (long j = 0; j < up(keys); j += LANES) {
                const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(x + b * line + j));
                _mm256_store_si256(reinterpret_cast<__m256i*>(rows.pairs() + (b * line + j) / 2), low);
            }
        return rows.pairs();
    }
    // The same, two rows a pair.
    static void across_rows(const float* x, long line, long keys, uint32_t* to) {
        for (long b = 0; b < BLOCK; b += 2, to += line) {
            for (long j = 0; j < up(keys); j += LANES) {
                const __m512 low = _mm512_load_ps(x + b * line + j), high = _mm512_load_ps(x + (b + 1) * line + j);
                _mm512_store_si512(to + j, pairs_of(low, high));
            }
            std::fill(to + up(keys), to + line, 0);  // later queries of the same sums see more keys
        }
    }
    // BLOCK rows of `left` times the first `pairs` of `all` paired rows, 64 of the columns after 64.
    template <bool ADD, class At, class C>
    static void times(const uint32_t* left, At at, const uint32_t* right, long pairs, long all, long columns, C* to, long line,
                      long valid = BLOCK) {
        for (long c = 0; c < columns; c += PANEL) {
            const uint32_t* panel = right + c * all;
            const long some = std::min(PANEL, columns - c);
            const float* plus = ADD ? reinterpret_cast<const float*>(to + c) : nullptr;
            switch (up(some) / LANES) {
                case 1: tile<BLOCK, 1, 1 * LANES, ADD>(left, at, panel, pairs, to + c, line, 1, some, valid, plus); break;
                case 2: tile<BLOCK, 2, 2 * LANES, ADD>(left, at, panel, pairs, to + c, line, 1, some, valid, plus); break;
                case 3: tile<BLOCK, 3, 3 * LANES, ADD>(left, at, panel, pairs, to + c, line, 1, some, valid, plus); break;
                default: tile<BLOCK, 4, 4 * LANES, ADD>(left, at, panel, pairs, to + c, line, 1, some, valid, plus);
            }
        }
    }

    void values(Head& head, const bf16* from, long next) {
        const long pairs = (head.L + 1) / 2;
        v.resize(pairs * head.width);
        rows.resize(BLOCK * head.line / 2);
        pair_up(from, next, head.L, head.K, pairs, v.pairs());
    }
    void give(Head& head, const float* p, long i, long keys, bf16* out, long next) {
        const uint32_t* left = along_rows(p, head.line, keys);
        times<false>(left, ByRows{head.line / 2}, v.pairs(), (keys + 1) / 2, (head.L + 1) / 2, head.K, out + i * next, next,
                     std::min(long(BLOCK), head.L - i));
    }

    void gradient(Head& head, const bf16* from, long next, const bf16* grad, long grad_next) {
        const long L = head.L, K = head.K, width = head.width, all = up(L) + LANES, pairs = (L + 1) / 2;
        rows.resize(BLOCK * head.line / 2);
        v_over.resize((L + PANEL - 1) / PANEL * PANEL * (K / 2));
        turn_pairs(from, next, L, K, v_over.pairs());
        k.resize(pairs * width);
        pair_up(head.k.data(), width, K, pairs, k.pairs());
        of_out.zeros((L + BLOCK) * K / 2);
        for (long i = 0; i < L; i++) std::memcpy(of_out.pairs() + i * (K / 2), grad + i * grad_next, 2 * K);
        p_pairs.resize(QUERIES / 2 * head.line);
        s_pairs.resize(QUERIES / 2 * head.line);
        q_pairs.resize(QUERIES / 2 * width);
        out_pairs.resize(QUERIES / 2 * width);
        of_q.resize(BLOCK * width);
        of_k.zeros(all * width);
        of_v.zeros(all * width);
        count = most = 0;
    }
    void of_weights(Head& head, long i, long keys, float* s) {
        const long K = head.K;
        const uint32_t* left = of_out.pairs() + i * (K / 2);
        for (long j = 0; j < keys; j += PANEL) {
            const uint32_t* panel = v_over.pairs() + j * (K / 2);
            const long columns = std::min(PANEL, up(keys - j));
            BY_VECTORS(keys_of_tile, columns, left, K / 2, panel, s + j, head.line)
        }
    }
    template <int V>
    static void keys_of_tile(const uint32_t* left, long pairs, const uint32_t* panel, float* s, long line) {
        tile<BLOCK, V>(left, ByRows{pairs}, panel, pairs, s, line, 1, V * LANES);
    }
    void take(Head& head, const float* p, const float* s, long i, long keys) {
        const long line = head.line, width = head.width, K = head.K;
        const uint32_t* left = along_rows(s, line, keys);
        times<false>(left, ByRows{line / 2}, k.pairs(), (keys + 1) / 2, (head.L + 1) / 2, width, of_q.data(), width);
        if (!count) first = i;
        across_rows(p, line, keys, p_pairs.pairs() + count / 2 * line);
        across_rows(s, line, keys, s_pairs.pairs() + count / 2 * line);
        count += BLOCK, most = std::max(most, keys);
        if (count < QUERIES && i + BLOCK < head.L) return;
        pair_up(head.q.data() + first * width, width, K, count / 2, q_pairs.pairs());
        pair_up(reinterpret_cast<const bf16*>(of_out.pairs()) + first * K, K, count, K, count / 2, out_pairs.pairs());
        for (long j = 0; j < most; j += BLOCK) {
            times<true>(s_pairs.pairs() + j, ByPairs{line}, q_pairs.pairs(), count / 2, count / 2, width,
                        of_k.data() + j * width, width);
            times<true>(p_pairs.pairs() + j, ByPairs{line}, out_pairs.pairs(), count / 2, count / 2, width,
                        of_v.data() + j * width, width);
        }
        count = most = 0;
    }
};

inline Paired multiplied(bf16) { return {}; }
#else
inline Single<bf16> multiplied(bf16) { return {}; }
#endif
inline Single<float> multiplied(float) { return {}; }
template <class Q>
using Multiplied = decltype(multiplied(Q()));

}  // namespace
