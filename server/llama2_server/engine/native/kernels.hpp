// The kernels of one instruction set. decode.cpp includes this file once per instruction set, with the compiler
// switched to it and LLAMA2_INSTRUCTIONS as the namespace. Hence this file and its includes have no guard.

namespace {
namespace LLAMA2_INSTRUCTIONS {

#include "simd.hpp"

#include "matmul.hpp"

void widen(const Half *from, int count, float *to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) store(to + i, load_partial(from + i, count - i));
}

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

const Kernels kernels = {matmul, rmsnorm, swiglu, append_to_cache, attend, widen, read};

}  // namespace LLAMA2_INSTRUCTIONS
}  // namespace
