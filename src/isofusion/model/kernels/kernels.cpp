// What a training step on a CPU spends its time on: attention, norms, SwiGLU, routing, the head's loss, the optimizer, each in
// one pass over memory, and on processors with avx512_bf16 the matrix products. Formulas as in fused.py, experts.py and
// head_loss.py, which run where no C++ compiler is found.
//
// Compiled at first use by kernel_build.py, called by native.py. Work is shared among threads in fixed pieces, and sums over
// slots are added up in the order of the pieces, so results depend on the number of threads and on nothing else; attention,
// products and the gradient norm not even on that. bf16 is rounded to nearest even. Everything is float32 but the factors of
// products, of those with attention's weights too.
//
// attention.h walks over documents and heads: turn.h (QK-norm, RoPE) -> head.h (scores, softmax) -> values.h (what weights
// are multiplied with, in float32, or in bf16 by the tiles of products.h). numbers.h and vectors.h are what all stand on.
//
// T slots, D width, F feed-forward hidden, H heads, K head_dim, E experts, V vocabulary

#include "attention.h"
#include "experts.h"
#include "numbers.h"
#include "products.h"
#include "rows.h"

// The names that native.py calls, with the number format of a product behind each.
#define VARIANT(Q, suffix)                                                                                             \
    void rms_norm_##suffix(const float* x, const float* gain, Q* out, float* scale, long T, long D, float eps,         \
                           int threads) {                                                                              \
        rms_norm(x, gain, out, scale, T, D, eps, threads);                                                             \
    }                                                                                                                  \
    void rms_norm_backward_##suffix(const Q* grad, const float* x, const float* gain, const float* scale,              \
                                    const float* plus, float* to_x, float* to_gain, long T, long D, int threads) {     \
        rms_norm_backward(grad, x, gain, scale, plus, to_x, to_gain, T, D, threads);                                   \
    }                                                                                                                  \
    void attention_##suffix(const Q* qkv, const float* gain_q, const float* gain_k, const float* phase,                \
                            const int64_t* edges, const int32_t* last, Q* out, float* logsumexp, long N, long H,       \
                            long K, long stride, float eps, int threads) {                                             \
        BY_HEAD(attention_of, Q, qkv, gain_q, gain_k, phase, edges, last, out, logsumexp, N, H, K, stride, eps,        \
                threads)                                                                                               \
    }                                                                                                                  \
    void attention_backward_##suffix(const Q* grad, const Q* qkv, const float* gain_q, const float* gain_k,            \
                                     const float* phase, const int64_t* edges, const int32_t* last,                    \
                                     const float* logsumexp, Q* to, float* to_gain_q, float* to_gain_k, long N,        \
                                     long H, long K, long stride, float eps, int threads) {                            \
        BY_HEAD(attention_back, Q, grad, qkv, gain_q, gain_k, phase, edges, last, logsumexp, to, to_gain_q, to_gain_k, \
                N, H, K, stride, eps, threads)                                                                         \
    }                                                                                                                  \
    void swiglu_##suffix(const Q* gate_up, Q* out, long T, long F, int threads) {                                      \
        swiglu(gate_up, out, T, F, threads);                                                                           \
    }                                                                                                                  \
    void swiglu_backward_##suffix(const Q* grad, const Q* gate_up, Q* to, long T, long F, int threads) {               \
        swiglu_backward(grad, gate_up, to, T, F, threads);                                                             \
    }                                                                                                                  \
    void route_##suffix(const Q* x, const float* router, float* share, long T, long D, long E, int threads) {           \
        route(x, router, share, T, D, E, threads);                                                                     \
    }                                                                                                                  \
    void route_backward_##suffix(const float* grad, const Q* x, const float* router, const float* share, Q* to_x,      \
                                 float* to_router, long T, long D, long E, int threads) {                              \
        route_backward(grad, x, router, share, to_x, to_router, T, D, E, threads);                                     \
    }                                                                                                                  \
    void combine_##suffix(const Q* rows, const float* gate, const int64_t* place, float* out, long T, long C, long D,  \
                          int threads) {                                                                               \
        combine(rows, gate, place, out, T, C, D, threads);                                                             \
    }                                                                                                                  \
    void combine_backward_##suffix(const float* grad, const Q* rows, const float* gate, const int64_t* place,          \
                                   Q* to_rows, float* to_gate, long T, long C, long D, int threads) {                  \
        combine_backward(grad, rows, gate, place, to_rows, to_gate, T, C, D, threads);                                 \
    }                                                                                                                  \
    void collect_##suffix(const Q* rows, const int64_t* place, Q* out, long T, long C, long D, int threads) {          \
        collect(rows, place, out, T, C, D, threads);                                                                   \
    }

extern "C" {
VARIANT(float, f32)
VARIANT(bf16, bf16)

#if defined(__AVX512BF16__)
int has_products() { return 1; }
void product_bf16(const bf16* x, const float* weight, const int64_t* edges, bf16* out, long E, long D, long F, int threads) {
    product(x, weight, edges, out, E, D, F, threads);
}
void product_transposed_bf16(const bf16* x, const float* weight, const int64_t* edges, bf16* out, long E, long D, long F,
                             int threads) {
    product_transposed(x, weight, edges, out, E, D, F, threads);
}
void product_transposed_plus_bf16(const bf16* x, const float* weight, const int64_t* edges, const float* plus, float* out,
                                  long E, long D, long F, int threads) {
    product_transposed<true>(x, weight, edges, out, E, D, F, threads, plus);
}
void product_of_rows_bf16(const bf16* x, const bf16* y, const int64_t* edges, float* out, long E, long D, long F,
                          int threads) {
    product_of_rows(x, y, edges, out, E, D, F, threads);
}
#endif
void sort_choices_i64(const int64_t* expert, const bool* real, const int64_t* modality, int64_t* counts, int64_t* edges,
                      int64_t* order, int64_t* place, long T, long C, long E) {
    sort_choices(expert, real, modality, counts, edges, order, place, T, C, E);
}
double sum_of_squares(const float* x, long n, int threads) { return squares(x, n, threads); }
void adamw_f32(float* weight, const float* grad, float* mean, float* square, long n, float scale, float kept, float fresh1,
               float fresh2, float rate, float root, float eps, int threads) {
    adamw(weight, grad, mean, square, n, scale, kept, fresh1, fresh2, rate, root, eps, threads);
}
void head_loss_bf16(bf16* logits, const int64_t* targets, float* nll, long n, long V, int threads) {
    head_loss(logits, targets, nll, n, V, threads);
}
}
