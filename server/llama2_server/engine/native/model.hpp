// Types shared by the whole native step: the model as Python passes it, and the kernels of each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

using Half = std::uint16_t;  // the bits of an IEEE float16; kernels widen whole vectors of them

// The structs that Python fills; `native/library.py` mirrors them field by field.
struct Layer {
    const Half *attention_norm, *qkv, *output, *mlp_norm, *gate_up, *down;
    Half *keys, *values;  // (slots, kv_heads, context, head_dim)
};

struct Model {
    std::int32_t vocab, hidden, inner, layers, heads, kv_heads, head_dim, context, slots;
    float norm_epsilon;
    const Half *embedding, *norm, *head;
    const float *cosines, *sines;  // (context, head_dim); sines of a head's first half are negated
};

namespace {

constexpr int LANES = 16;  // partial sums of every dot product

constexpr int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

// Tokens of a prompt that attend together, given the query heads per key head (`group`): a few queries share each key.
constexpr int attention_tokens(int group) { return std::max(4 / group, 1); }

// The attention of one or a few consecutive tokens of a slot to one key head.
struct Attention {
    // (tokens, group, head_dim), then two of (tokens, head_dim), before the rotary embedding; tokens `stride` apart
    const float *queries, *key, *value;
    std::size_t stride;
    const float *cosines, *sines;  // (tokens, head_dim), of their positions
    Half *keys, *values;           // (context, head_dim): this head's part of the KV cache
    int tokens, position, group, head_dim;  // `position` belongs to the first token
    float *out;                    // (tokens, group, head_dim), tokens `out_stride` apart
    std::size_t out_stride;
    float *scratch;  // per thread: attention_tokens * group rows of queries, then of sums, then of scores
};

// The kernels of one instruction set.
struct Kernels {
    void (*matmul)(const Half *weights, int outputs, int width, const float *x, std::size_t stride, int rows,
                   float *out, std::size_t out_stride);
    void (*rmsnorm)(const float *x, const Half *weights, int width, float epsilon, float *out);
    void (*swiglu)(const float *gates, const float *ups, int count, float *out);
    void (*append_to_cache)(const Attention &attention);  // writes keys and values to the KV cache
    void (*attend)(const Attention &attention);
    void (*widen)(const Half *from, int count, float *to);
    std::uint64_t (*read)(const std::uint64_t *memory, std::size_t bytes);
};

// e^x to 2 units in the last place (Cephes' expf), in operations that compilers can vectorize.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shifted = std::fma(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
    const float n = shifted - 12582912.0f;
    const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
    // Unrolled by hand: compilers do not vectorize a nested loop.
    float p = std::fma(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = std::fma(p, r, 8.3334519073e-3f);
    p = std::fma(p, r, 4.1665795894e-2f);
    p = std::fma(p, r, 1.6666665459e-1f);
    p = std::fma(p, r, 5.0000001201e-1f);
    p = std::fma(p, r, 1.0f);
    p = std::fma(p, r, 1.0f);
    std::uint32_t bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

}  // namespace
