// The kernels of one instruction set. decode.cpp includes this file once per instruction set, with the compiler
// switched to it and LLAMA2_INSTRUCTIONS as the namespace. Hence this file and its includes have no guard.

namespace {
namespace LLAMA2_INSTRUCTIONS {

#include "simd.hpp"

void widen(const Half *from, int count, float *to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) store(to + i, load_partial(from + i, count - i));
}

#include "matmul.hpp"

#include "packing.hpp"

#include "packed_matmul.hpp"

// RMSNorm (Zhang and Sennrich 2019).
void rmsnorm(const float *x, const Half *weights, int width, float epsilon, float *out) {
    Vector squares = broadcast(0);
    for (int i = 0; i < width; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const float scale = 1 / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
    widen(weights, width, out);
    for (int i = 0; i < width; ++i) out[i] *= x[i] * scale;
}

// SwiGLU (Shazeer 2020): silu(gate) * up.
void swiglu(const float *gates, const float *ups, int count, float *out) {
    for (int i = 0; i < count; ++i) out[i] = gates[i] / (1 + exponential(-gates[i])) * ups[i];
}

#include "attention.hpp"

std::uint64_t read(const std::uint64_t *memory, std::size_t bytes) {
    std::uint64_t found[8] = {};
    for (std::size_t i = 0; i < bytes / sizeof *memory; i += 8)
        for (int j = 0; j < 8; ++j) found[j] ^= memory[i + j];
    return found[0] ^ found[1] ^ found[2] ^ found[3] ^ found[4] ^ found[5] ^ found[6] ^ found[7];
}

float largest(const float *logits, int count) {
    // Integers that are ordered like the floats: compilers vectorize the maximum of integers.
    std::int32_t greatest = std::numeric_limits<std::int32_t>::min(), magnitude = 0;
    for (int i = 0; i < count; ++i) {
        std::int32_t bits;
        std::memcpy(&bits, logits + i, sizeof bits);
        greatest = std::max(greatest, bits ^ ((bits >> 31) & 0x7fffffff));
        magnitude = std::max(magnitude, bits & 0x7fffffff);
    }
    if (magnitude >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
    greatest ^= (greatest >> 31) & 0x7fffffff;
    float found;
    std::memcpy(&found, &greatest, sizeof found);
    return found;
}

int collect(const float *logits, int count, float smallest, std::int32_t *indices) {
    const int whole = count / LANES * LANES;
    int found = 0;  // at most `i`, so a group never writes beyond its own indices
    for (int i = 0; i < whole; i += LANES) found += collect(logits + i, smallest, i, indices + found);
    for (int i = whole; i < count; ++i)
        if (logits[i] >= smallest) indices[found++] = i;
    return found;
}

void weigh(const float *logits, int count, float largest, double factor, double *weights) {
    for (int i = 0; i < count; ++i) weights[i] = exponential((static_cast<double>(logits[i]) - largest) * factor);
}

double sum_of_weights(const float *logits, int count, float largest, double factor) {
    double sums[LANES] = {}, weights[16 * LANES];
    for (int begin = 0; begin < count; begin += 16 * LANES) {
        const int length = std::min(16 * LANES, count - begin), whole = length / LANES * LANES;
        weigh(logits + begin, length, largest, factor, weights);
        for (int i = 0; i < whole; i += LANES)
            for (int lane = 0; lane < LANES; ++lane) sums[lane] += weights[i + lane];
        for (int i = whole; i < length; ++i) sums[i - whole] += weights[i];
    }
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    return sums[0];
}

constexpr std::size_t no_tiles(int, int) { return 0; }

constexpr Kernels kernels = {PREFILL_ROWS, OUTPUT_BLOCK,    scratch_floats, no_tiles,       nullptr,
                             matmul,       unpack,          row_bytes,      measure,        pack,
                             rmsnorm,      swiglu,          append_to_cache, attend,        ATTENTION_ROWS,
                             attention_floats, read,        largest,        collect,        weigh,
                             sum_of_weights};

}  // namespace LLAMA2_INSTRUCTIONS
}  // namespace
