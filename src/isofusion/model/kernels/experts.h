// The router of experts, and how rows come back from them.

#pragma once

#include <algorithm>
#include "vectors.h"

namespace {

// share[t] = softmax over the E experts of x[t] times the router [E, D], float32.
template <class Q>
void route(const Q* x, const float* router, float* share, long T, long D, long E, int threads) {
    threads = useful(T * D, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        std::vector<float> row(D);
        for (long t = mine.from; t < mine.to; t++) {
            for (long d = 0; d < D; d++) row[d] = load(x + t * D + d);
            float *out = share + t * E, top = -INFINITY, sum = 0.0f;
            for (long e = 0; e < E; e++) {
                out[e] = dot(row.data(), router + e * D, D);
                top = out[e] > top ? out[e] : top;
            }
            for (long e = 0; e < E; e++) sum += out[e] = exp_of(out[e] - top);
            for (long e = 0; e < E; e++) out[e] /= sum;
        }
    }
}

template <class Q>
void route_backward(const float* grad, const Q* x, const float* router, const float* share, Q* to_x, float* to_router, long T,
                    long D, long E, int threads) {
    constexpr long SIDE = 4;  // slots and experts that meet at once: every number read takes part in four products
    const long line = up(D), experts = (E + SIDE - 1) / SIDE * SIDE;
    threads = useful(T * D, threads);
    std::vector<float> sums(size_t(threads) * E * D);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        Numbers rows, backs, weights, owns;
        rows.zeros(SIDE * line), backs.zeros(SIDE * line), weights.zeros(experts * line), owns.zeros(experts * line);
        float *row = rows.data(), *back = backs.data(), *weight = weights.data(), *own = owns.data();
        for (long e = 0; e < E; e++) std::copy(router + e * D, router + (e + 1) * D, weight + e * line);
        std::vector<float> of(SIDE * experts);
        for (long t = mine.from; t < mine.to; t += SIDE) {
            const long slots = std::min(SIDE, mine.to - t);
            std::fill(back, back + SIDE * line, 0.0f);
            std::fill(of.begin(), of.end(), 0.0f);
            for (long i = 0; i < slots; i++) {
                const float *g = grad + (t + i) * E, *s = share + (t + i) * E;
                float along = 0.0f;
                for (long e = 0; e < E; e++) along += g[e] * s[e];
                for (long e = 0; e < E; e++) of[e * SIDE + i] = s[e] * (g[e] - along);
                for (long d = 0; d < D; d++) row[i * line + d] = load(x + (t + i) * D + d);
            }
            for (long e = 0; e < experts; e += SIDE)
                for (long d = 0; d < line; d += LANES) {
                    vec r[SIDE], b[SIDE];
                    for (long i = 0; i < SIDE; i++) r[i] = at(row + i * line + d), b[i] = at(back + i * line + d);
                    for (long j = e; j < e + SIDE; j++) {
                        const vec w = at(weight + j * line + d);
                        vec to = at(own + j * line + d);
                        for (long i = 0; i < SIDE; i++) b[i] += of[j * SIDE + i] * w, to += of[j * SIDE + i] * r[i];
                        at(own + j * line + d) = to;
                    }
                    for (long i = 0; i < SIDE; i++) at(back + i * line + d) = b[i];
                }
            for (long i = 0; i < slots; i++)
                for (long d = 0; d < D; d++) store(to_x + (t + i) * D + d, back[i * line + d]);
        }
        for (long e = 0; e < E; e++) std::copy(own + e * line, own + e * line + D, sums.begin() + (p * E + e) * D);
    }
    for (long i = 0; i < E * D; i++) to_router[i] = 0.0f;
    for (int p = 0; p < threads; p++)
        for (long i = 0; i < E * D; i++) to_router[i] += sums[size_t(p) * E * D + i];
}

// Choices [T, C] of real slots, sorted by expert and then by slot: `order` says which choice each row is, `place` which row
// each choice got (-1: its slot is padding), `edges` where the rows of each expert begin; counts [2, E] by modality.
void sort_choices(const int64_t* expert, const bool* real, const int64_t* modality, int64_t* counts, int64_t* edges,
                  int64_t* order, int64_t* place, long T, long C, long E) {
    std::fill(counts, counts + 2 * E, 0);
    for (long t = 0; t < T; t++)
        for (long c = 0; real[t] && c < C; c++) counts[modality[t] * E + expert[t * C + c]]++;
    std::vector<int64_t> next(E);
    edges[0] = 0;
    for (long e = 0; e < E; e++) {
        next[e] = edges[e];
        edges[e + 1] = edges[e] + counts[e] + counts[E + e];
    }
    for (long t = 0; t < T; t++)
        for (long i = t * C; i < (t + 1) * C; i++) {
            place[i] = real[t] ? next[expert[i]]++ : -1;
            if (real[t]) order[place[i]] = i;
        }
}

// Each slot's C choices among the rows of experts are at place[t][c], or nowhere (-1); a row is one slot's.
// out[t] = sum over its choices of gate * row.
template <class Q>
void combine(const Q* rows, const float* gate, const int64_t* place, float* out, long T, long C, long D, int threads) {
    threads = useful(T * D, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        for (long t = mine.from; t < mine.to; t++) {
            float* to = out + t * D;
            std::fill(to, to + D, 0.0f);
            for (long c = t * C; c < (t + 1) * C; c++) {
                if (place[c] < 0) continue;
                const Q* row = rows + place[c] * D;
                const float g = gate[c];
#pragma omp simd
                for (long d = 0; d < D; d++) to[d] += g * load(row + d);
            }
        }
    }
}

// Its gradient. Rows that no slot names must hold zeros already.
template <class Q>
void combine_backward(const float* grad, const Q* rows, const float* gate, const int64_t* place, Q* to_rows, float* to_gate,
                      long T, long C, long D, int threads) {
    threads = useful(T * D, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        for (long t = mine.from; t < mine.to; t++)
            for (long c = t * C; c < (t + 1) * C; c++) {
                to_gate[c] = 0.0f;
                if (place[c] < 0) continue;
                const Q* row = rows + place[c] * D;
                Q* to = to_rows + place[c] * D;
                const float *of = grad + t * D, g = gate[c];
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (long d = 0; d < D; d++) {
                    sum += of[d] * load(row + d);
                    store(to + d, of[d] * g);
                }
                to_gate[c] = sum;
            }
    }
}

// to[t] = sum over its choices of the row.
template <class Q>
void collect(const Q* rows, const int64_t* place, Q* out, long T, long C, long D, int threads) {
    threads = useful(T * D, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        std::vector<float> sum(D);
        for (long t = mine.from; t < mine.to; t++) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (long c = t * C; c < (t + 1) * C; c++) {
                if (place[c] < 0) continue;
                const Q* row = rows + place[c] * D;
#pragma omp simd
                for (long d = 0; d < D; d++) sum[d] += load(row + d);
            }
#pragma omp simd
            for (long d = 0; d < D; d++) store(out + t * D + d, sum[d]);
        }
    }
}

}  // namespace
