// What works row by row: RMSNorm, SwiGLU, the loss of the head, the norm of a gradient.

#pragma once

#include <algorithm>
#include "numbers.h"

namespace {

template <class O>
void rms_norm(const float* x, const float* gain, O* out, float* scale, long T, long D, float eps, int threads) {
    threads = useful(T * D, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        for (long t = mine.from; t < mine.to; t++) {
            const float* row = x + t * D;
            const float s = scale[t] = scale_of(row, D, eps);
#pragma omp simd
            for (long d = 0; d < D; d++) store(out + t * D + d, row[d] * s * gain[d]);
        }
    }
}

// With u = x * scale: d x = scale * (g * gain - u * mean(g * gain * u)), d gain = sum over slots of g * u. `plus`: what is
// added to d x, or null.
template <class O>
void rms_norm_backward(const O* grad, const float* x, const float* gain, const float* scale, const float* plus, float* to_x,
                       float* to_gain, long T, long D, int threads) {
    threads = useful(T * D, threads);
    std::vector<float> sums(size_t(threads) * D, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        std::vector<float> buffer(D, 0.0f);
        float* own = buffer.data();
        for (long t = mine.from; t < mine.to; t++) {
            const float *row = x + t * D, s = scale[t];
            const O* g = grad + t * D;
            float along = 0.0f;
#pragma omp simd reduction(+ : along)
            for (long d = 0; d < D; d++) {
                const float part = load(g + d) * row[d] * s;
                own[d] += part;
                along += part * gain[d];
            }
            const float back = along / float(D) * s;
            float* to = to_x + t * D;
            if (plus)
#pragma omp simd
                for (long d = 0; d < D; d++) to[d] = plus[t * D + d] + s * (load(g + d) * gain[d] - row[d] * back);
            else
#pragma omp simd
                for (long d = 0; d < D; d++) to[d] = s * (load(g + d) * gain[d] - row[d] * back);
        }
        std::memcpy(sums.data() + size_t(p) * D, own, D * sizeof(float));
    }
    for (long d = 0; d < D; d++) to_gain[d] = 0.0f;
    for (int p = 0; p < threads; p++)
        for (long d = 0; d < D; d++) to_gain[d] += sums[size_t(p) * D + d];
}

template <class Q>
void swiglu(const Q* gate_up, Q* out, long T, long F, int threads) {
    threads = useful(T * F, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        for (long t = mine.from; t < mine.to; t++) {
            const Q *gate = gate_up + t * 2 * F, *up = gate + F;
#pragma omp simd
            for (long f = 0; f < F; f++) {
                const float x = load(gate + f);
                store(out + t * F + f, x / (1.0f + exp_of(-x)) * load(up + f));
            }
        }
    }
}

template <class Q>
void swiglu_backward(const Q* grad, const Q* gate_up, Q* to, long T, long F, int threads) {
    threads = useful(T * F, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(T, threads, p);
        for (long t = mine.from; t < mine.to; t++) {
            const Q *gate = gate_up + t * 2 * F, *up = gate + F, *g = grad + t * F;
            Q *to_gate = to + t * 2 * F, *to_up = to_gate + F;
#pragma omp simd
            for (long f = 0; f < F; f++) {
                const float x = load(gate + f), y = load(g + f);
                const float sigmoid = 1.0f / (1.0f + exp_of(-x)), silu = x * sigmoid;
                store(to_up + f, y * silu);
                store(to_gate + f, y * load(up + f) * (sigmoid + silu * (1.0f - sigmoid)));
            }
        }
    }
}

// Sum of x^2, in pieces of fixed size that are added up in order: no result depends on the number of threads.
double squares(const float* x, long n, int threads) {
    constexpr long PIECE = 1 << 16;
    std::vector<double> sums((n + PIECE - 1) / PIECE);
#pragma omp parallel for num_threads(useful(n, threads)) schedule(static)
    for (long p = 0; p < long(sums.size()); p++) {
        const float* from = x + p * PIECE;
        sums[p] = dot(from, from, std::min(PIECE, n - p * PIECE));
    }
    double sum = 0.0;
    for (const double part : sums) sum += part;
    return sum;
}

// a + share * (b - a), from the nearer end: from the other all digits of b may be lost.
inline float between(float a, float b, float share) {
    return share < 0.5f ? a + share * (b - a) : b - (1.0f - share) * (b - a);
}

// One update of AdamW (arXiv 1711.05101, algorithm 2, as PyTorch's): the gradient counts `scale` times, the weight first
// shrinks to `kept` of itself; fresh1 = 1 - beta1, fresh2 = 1 - beta2, of which float32 has more digits than of the betas;
// rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t).
void adamw(float* weight, const float* grad, float* mean, float* square, long n, float scale, float kept, float fresh1,
           float fresh2, float rate, float root, float eps, int threads) {
    threads = useful(n, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(n, threads, p);
#pragma omp simd
        for (long i = mine.from; i < mine.to; i++) {
            const float g = grad[i] * scale;
            const float m = between(mean[i], g, fresh1), s = between(square[i], g * g, fresh2);
            mean[i] = m;
            square[i] = s;
            weight[i] = kept * weight[i] - rate * m / (std::sqrt(s) * root + eps);
        }
    }
}

// Rows of logits become softmax minus one-hot, in place; nll = log(sum(exp(logits))) - logits[target].
void head_loss(bf16* logits, const int64_t* targets, float* nll, long n, long V, int threads) {
    threads = useful(n * V, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int p = 0; p < threads; p++) {
        const Piece mine = piece(n, threads, p);
        std::vector<float> buffer(V);
        float* e = buffer.data();
        for (long r = mine.from; r < mine.to; r++) {
            bf16* row = logits + r * V;
            if (targets[r] < 0 || targets[r] >= V) {
                nll[r] = NAN;
                continue;
            }
            const float own = load(row + targets[r]);
            float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
            for (long v = 0; v < V; v++) {
                const float x = load(row + v);
                top = x > top ? x : top;
            }
#pragma omp simd reduction(+ : sum)
            for (long v = 0; v < V; v++) sum += e[v] = exp_of(load(row + v) - top);
            const float share = 1.0f / sum;
#pragma omp simd
            for (long v = 0; v < V; v++) store(row + v, e[v] * share);
            nll[r] = std::log(sum) + top - own;
            store(row + targets[r], e[targets[r]] * share - 1.0f);
        }
    }
}

}  // namespace
