// Types shared by the whole native step: the model as Python passes it, and the kernels of each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

using Half = std::uint16_t;  // the bits of an IEEE float16; kernels widen whole vectors of them

// How a row of a packed matrix is stored (kernels/packing.hpp).
enum RowFormat { FLOAT16, TWELVE_BITS, TWELVE_BITS_WITH_BASES };
constexpr std::uint64_t ROW_ALIGNMENT = 64;  // rows start at a cache line, so the low bits of an offset hold the format

// The structs that Python fills; `native/library.py` mirrors them field by field.

// A weight matrix. Without `rows`, it has float16 rows one after another. Otherwise each row, or each group of 16 rows in
// tiles (kernels/tile_packing.hpp), has an entry in `rows`: its offset in `memory` plus its RowFormat.
struct Matrix {
    const std::uint8_t *memory;
    const std::uint64_t *rows;
};

struct Layer {
    const Half *attention_norm, *mlp_norm;
    Matrix qkv, output, gate_up, down;
    Half *keys, *values;  // (slots, kv_heads, context, head_dim)
};

struct Model {
    std::int32_t vocab, hidden, inner, layers, heads, kv_heads, head_dim, context, slots;
    float norm_epsilon;
    Matrix embedding, head;
    const Half *norm;
    const float *cosines, *sines;  // (context, head_dim); sines of a head's first half are negated
};

namespace {

constexpr int LANES = 16;  // partial sums of every dot product

constexpr int UNPACKED_ROWS = 4;  // rows of a packed matrix that are unpacked together for many rows of activations

constexpr int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

// The attention of one or a few consecutive tokens of a slot to one key head.
struct Attention {
    // (tokens, group, head_dim), then two of (tokens, head_dim), before the rotary embedding; tokens `stride` apart
    const float *queries, *key, *value;
    std::size_t stride;
    const float *cosines, *sines;  // (tokens, head_dim), of their positions
    Half *keys, *values;           // (context, head_dim): this head's part of the KV cache
    const Half *next_keys;         // the keys that the thread probably reads next
    int tokens, position, group, head_dim;  // `position` belongs to the first token
    float *out;                    // (tokens, group, head_dim), tokens `out_stride` apart
    std::size_t out_stride;
    float *scratch;  // Kernels::attention_floats, per thread
};

// Rows `begin` to `begin + outputs` of a matrix.
struct MatrixRows {
    const Matrix &matrix;
    int begin, outputs, width;
};

// Rows of activations, `stride` apart, each padded with zeros to whole vectors.
struct Activations {
    const float *x;
    std::size_t stride;
    int rows;
    const std::uint16_t *tiles;  // the same numbers, written by Kernels::split; null without it
};

// The kernels of one instruction set.
struct Kernels {
    int prefill_rows;   // prompt tokens per step: enough to be compute-bound instead of memory-bound
    int output_block;   // outputs that a thread computes together
    std::size_t (*scratch_floats)(int width);  // what `matmul` needs per thread for rows of this width
    std::size_t (*tile_numbers)(int rows, int width);  // the size of Activations::tiles
    // Writes `count` rows of activations from `begin` on, a multiple of 16, as tiles; null if `matmul` needs none.
    void (*split)(const Activations &x, int begin, int count, int width, std::uint16_t *tiles);
    // out[row][output] = x[row] . weights[output]
    void (*matmul)(const MatrixRows &weights, const Activations &x, float *out, std::size_t out_stride, float *scratch);
    void (*unpack)(const Matrix &matrix, int row, int width, float *out);  // `out` is padded with zeros
    std::size_t (*row_bytes)(int format, int width);
    // Writes the RowFormat of each float16 row, and returns the bytes of all packed rows, or -1 if a number is not finite.
    // For tiles, both count groups of 16 rows, and without `twelve_bits` all of them are FLOAT16.
    std::int64_t (*measure)(const Half *from, int rows, int width, bool twelve_bits, std::uint64_t *entries);
    // Packs measured rows to `memory` from `offset` on, and replaces each format by the row's entry.
    void (*pack)(const Half *from, int rows, int width, std::uint64_t *entries, std::uint8_t *memory,
                 std::uint64_t offset);
    void (*rmsnorm)(const float *x, const Half *weights, int width, float epsilon, float *out);
    void (*swiglu)(const float *gates, const float *ups, int count, float *out);
    void (*append_to_cache)(const Attention &attention);  // writes keys and values to the KV cache
    void (*attend)(const Attention &attention);
    int attention_rows;  // queries that share each key: consecutive tokens of a prompt times the heads of a group
    std::size_t (*attention_floats)(int group, int head_dim, int context);  // the size of Attention::scratch

    // Tokens of a prompt that attend together, given the query heads per key head (`group`).
    constexpr int attention_tokens(int group) const { return std::max(attention_rows / group, 1); }
    std::uint64_t (*read)(const std::uint64_t *memory, std::size_t bytes);
    // The largest logit, or NaN if one is not finite.
    float (*largest)(const float *logits, int count);
    // Writes the indices of all logits that are at least `smallest`, in ascending order, and returns their number.
    int (*collect)(const float *logits, int count, float smallest, std::int32_t *indices);
    // The weight of each logit for the draw: exp((logit - largest) * factor).
    void (*weigh)(const float *logits, int count, float largest, double factor, double *weights);
    double (*sum_of_weights)(const float *logits, int count, float largest, double factor);
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

// e^x for x <= 0 to 1 unit in the last place, or 0 below the normal numbers; vectorizable like the function above.
inline double exponential(double x) {
    const double limited = std::max(x, -708.0);
    const double shifted = std::fma(limited, 1.4426950408889634, 6755399441055744.0);  // 1.5 * 2^52
    const double n = shifted - 6755399441055744.0;
    // ln 2 in two parts (Cephes).
    const double r = std::fma(n, -1.42860682030941723212e-6, std::fma(n, -6.93145751953125e-1, limited));
    // A polynomial through e^r at the Chebyshev nodes; its relative error is below 2e-17.
    double p = std::fma(2.5100424157005067e-08, r, 2.7620138719733994e-07);
    p = std::fma(p, r, 2.7557268378684192e-06);
    p = std::fma(p, r, 2.480152119021773e-05);
    p = std::fma(p, r, 1.9841269863105968e-04);
    p = std::fma(p, r, 1.3888888917281794e-03);
    p = std::fma(p, r, 8.333333333330051e-03);
    p = std::fma(p, r, 4.166666666662399e-02);
    p = std::fma(p, r, 1.6666666666666669e-01);
    p = std::fma(p, r, 5.000000000000001e-01);
    p = std::fma(p, r, 1.0);
    p = std::fma(p, r, 1.0);
    const double margin = x + 708.0;
    std::uint64_t bits, exponent, negative;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    std::memcpy(&negative, &margin, sizeof negative);
    // A mask instead of a condition, which compilers do not vectorize.
    bits = (bits + (exponent << 52)) & ((negative >> 63) - 1);
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

}  // namespace
