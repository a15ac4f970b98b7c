// The Llama forward pass on a CPU: float16 weights, float32 activations, one or more rows per step. A row is the next
// token of a sequence, a guess of a later token (a draft), or a token of a prompt; a step can have rows of all kinds.
//
// Decoding reads every weight once per token, so it is memory-bound. The design keeps the memory busy: weights are
// streamed in memory order with prefetching, and all sequences of a step share one pass over the weights. Threads take
// the work in small chunks, so that a thread that loses its core hardly delays the others. The tokens of a prompt share
// that pass too; with many rows the step is compute-bound, and matmul.hpp keeps the arithmetic units busy.
//
// Every result has the same bits for any number of threads and any other rows in the step: each sum has one fixed order,
// and sums are never split between threads. There are two families of kernels. The portable ones add up 16 lanes, with the
// same bits for every instruction set. Those of Intel AMX (kernels/amx.hpp) multiply in tiles, with an order of their own.
//
// The model is described by Touvron et al. 2023 (arXiv:2307.09288) and follows transformers' conventions;
// `model/llama.py` has the same step in torch. The interface is plain C: Python calls it through ctypes, and the build
// does not need torch.
//
// This file is the interface. decoder.hpp has the stages of a step, thread_pool.hpp the threads, and kernels/ the kernels,
// which are compiled once per instruction set and selected at run time (as in Google's Highway).

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "this processor has no native kernels; the server runs in torch instead"
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
// Compilers know AMX from these versions on.
#if defined(__linux__) && defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define LLAMA2_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "decoder.hpp"
#include "model.hpp"

#define LLAMA2_EXPORT extern "C" __attribute__((visibility("default")))

#define LLAMA2_STRING(text) #text
#if defined(__clang__)
#define LLAMA2_BEGIN(flags) \
    _Pragma(LLAMA2_STRING(clang attribute push(__attribute__((target(flags))), apply_to = function)))
#define LLAMA2_END _Pragma("clang attribute pop")
#else
#define LLAMA2_BEGIN(flags) _Pragma("GCC push_options") _Pragma(LLAMA2_STRING(GCC target(flags)))
#define LLAMA2_END _Pragma("GCC pop_options")
#endif

#if defined(__x86_64__)
#define LLAMA2_INSTRUCTIONS avx2
LLAMA2_BEGIN("avx2,fma,f16c")
#include "kernels/kernels.hpp"
LLAMA2_END
#undef LLAMA2_INSTRUCTIONS
#define LLAMA2_INSTRUCTIONS avx512
#define LLAMA2_AVX512
LLAMA2_BEGIN("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#include "kernels/kernels.hpp"
LLAMA2_END
#if defined(LLAMA2_AMX)
LLAMA2_BEGIN("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,amx-tile,amx-bf16")
#include "kernels/amx.hpp"
LLAMA2_END
#endif
#else
#define LLAMA2_INSTRUCTIONS neon
#include "kernels/kernels.hpp"
#endif

namespace {

// Returns the kernels called `name` ("" = the best of the portable family), or null if the processor does not support
// them. The portable kernels give the same bits; those of AMX give others.
const Kernels *find_kernels(const char *name, const char **found) {
    struct Entry {
        const char *name;
        const Kernels *kernels;
        bool supported;
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const Entry entries[] = {{"AVX-512", &avx512::kernels, avx512}, {"AVX2", &avx2::kernels, avx2}};
#if defined(LLAMA2_AMX)
    static const bool tiles = avx512 && amx::available();
    if (tiles && std::strcmp(name, "AMX") == 0) {
        *found = "AMX";
        return &amx::kernels;
    }
#endif
#else
    const Entry entries[] = {{"NEON", &neon::kernels, true}};
#endif
    for (const Entry &entry : entries) {
        if (entry.supported && (*name == 0 || std::strcmp(name, entry.name) == 0)) {
            *found = entry.name;
            return entry.kernels;
        }
    }
    return nullptr;
}

}  // namespace

// The interface version. Increase it with every change that Python sees, so that an outdated library is never called.
LLAMA2_EXPORT int llama2_interface() { return 7; }

// Returns the instruction set called `name` ("" = the best available), or null if this processor does not support it.
LLAMA2_EXPORT const char *llama2_instructions(const char *name) {
    const char *found = nullptr;
    find_kernels(name, &found);
    return found;
}

// Returns null if the processor does not support the instructions or if there is not enough memory.
LLAMA2_EXPORT Decoder *llama2_decoder_new(const Model *model, const Layer *layers, const char *instructions,
                                          int threads) {
    const char *found;
    const Kernels *kernels = find_kernels(instructions, &found);
    if (kernels == nullptr) return nullptr;
    try {
        return new Decoder(*model, layers, *kernels, threads);
    } catch (const std::exception &) {
        return nullptr;
    }
}

LLAMA2_EXPORT void llama2_decoder_free(Decoder *decoder) { delete decoder; }

// Returns the maximum number of rows in a step.
LLAMA2_EXPORT int llama2_decoder_max_rows(const Decoder *decoder) { return decoder->max_rows(); }

// Calls `Decoder::step`; returns false if an argument is out of range. If `logits` is null, it samples the last
// `logit_rows` rows: of consecutive rows with one sampler, those after a token that differs from the next row's are not
// sampled.
LLAMA2_EXPORT bool llama2_decoder_step(Decoder *decoder, int rows, const std::int32_t *slots,
                                       const std::int32_t *tokens, const std::int32_t *positions, int logit_rows,
                                       float *logits, Sampler *const *samplers, const double *uniforms,
                                       std::int32_t *sampled) {
    const Model &model = decoder->model();
    const auto within = [](std::int32_t value, std::int32_t end) { return 0 <= value && value < end; };
    if (rows < 1 || rows > decoder->max_rows() || logit_rows < 0 || logit_rows > rows) return false;
    for (int row = 0; row < rows; ++row)
        if (!within(slots[row], model.slots) || !within(tokens[row], model.vocab) ||
            !within(positions[row], model.context))
            return false;
    if (logits == nullptr)
        for (int row = 0; row < logit_rows; ++row)
            if (samplers[row]->vocab() != model.vocab) return false;
    decoder->step(rows, slots, tokens, positions, logit_rows, logits, {samplers, uniforms, sampled});
    return true;
}

// Returns the sampling state of a new sequence, or null if a prompt token does not exist or there is not enough memory.
LLAMA2_EXPORT Sampler *llama2_sampler_new(int vocab, const SamplingParams *params, const std::int32_t *prompt,
                                          int prompt_tokens) {
    try {
        return new Sampler(vocab, *params, prompt, prompt_tokens);
    } catch (const std::exception &) {
        return nullptr;
    }
}

LLAMA2_EXPORT void llama2_sampler_free(Sampler *sampler) { delete sampler; }

// Samples one token from `count` rows of logits, each of the sampler's vocabulary, one row after another. Returns false
// if the processor does not support the instructions or there is not enough memory.
LLAMA2_EXPORT bool llama2_sampler_sample(Sampler *sampler, const char *instructions, int count, const float *logits,
                                         const double *uniforms, std::int32_t *tokens) {
    const char *found;
    const Kernels *kernels = find_kernels(instructions, &found);
    if (kernels == nullptr) return false;
    try {
        SamplingScratch scratch(sampler->vocab());
        for (int row = 0; row < count; ++row)
            tokens[row] = sampler->sample(*kernels, logits + static_cast<std::size_t>(row) * sampler->vocab(),
                                          uniforms[row], scratch);
    } catch (const std::exception &) {
        return false;
    }
    return true;
}

// Writes the format of each row of a float16 matrix (see Kernels::measure), and returns the bytes of all packed rows, -1
// if a number is not finite, or -2 if this processor has no kernels.
LLAMA2_EXPORT std::int64_t llama2_measure_rows(const Half *from, int rows, int width, std::uint64_t *entries) {
    const char *found;
    const Kernels *kernels = find_kernels("", &found);
    return kernels == nullptr ? -2 : kernels->measure(from, rows, width, true, entries);
}

// Returns the bytes of a packed row of this RowFormat, the same for all instruction sets.
LLAMA2_EXPORT std::int64_t llama2_row_bytes(int format, int width) {
    const char *found;
    const Kernels *kernels = find_kernels("", &found);
    return kernels == nullptr ? 0 : static_cast<std::int64_t>(kernels->row_bytes(format, width));
}

// Packs measured rows; see Kernels::pack. All instruction sets write the same bytes.
LLAMA2_EXPORT void llama2_pack_rows(const Half *from, int rows, int width, std::uint64_t *entries,
                                    std::uint8_t *memory, std::uint64_t offset) {
    const char *found;
    if (const Kernels *kernels = find_kernels("", &found)) kernels->pack(from, rows, width, entries, memory, offset);
}

// The same three functions for groups of 16 rows in the order of AMX tiles (kernels/tile_packing.hpp), with one entry per
// group. Without `twelve_bits`, all groups are FLOAT16. The processor must support "AMX".
LLAMA2_EXPORT std::int64_t llama2_measure_tiles(const Half *from, int rows, int width, bool twelve_bits,
                                                std::uint64_t *entries) {
    const char *found;
    const Kernels *kernels = find_kernels("AMX", &found);
    return kernels == nullptr ? -2 : kernels->measure(from, rows, width, twelve_bits, entries);
}

LLAMA2_EXPORT std::int64_t llama2_tile_bytes(int format, int width) {
    const char *found;
    const Kernels *kernels = find_kernels("AMX", &found);
    return kernels == nullptr ? 0 : static_cast<std::int64_t>(kernels->row_bytes(format, width));
}

LLAMA2_EXPORT void llama2_pack_tiles(const Half *from, int rows, int width, std::uint64_t *entries,
                                     std::uint8_t *memory, std::uint64_t offset) {
    const char *found;
    if (const Kernels *kernels = find_kernels("AMX", &found)) kernels->pack(from, rows, width, entries, memory, offset);
}

// Returns the number of prompt tokens per step, or 0 if this processor does not support the instructions.
LLAMA2_EXPORT int llama2_prefill_rows(const char *instructions) {
    const char *found;
    const Kernels *kernels = find_kernels(instructions, &found);
    return kernels == nullptr ? 0 : kernels->prefill_rows;
}

// Multiplies x (rows, width) by a matrix of `outputs` rows to out (rows, outputs), on one thread. Returns false if this
// processor does not support the instructions or there is not enough memory.
LLAMA2_EXPORT bool llama2_multiply(const Matrix *matrix, int outputs, int width, const char *instructions,
                                   const float *x, int rows, float *out) {
    const char *found;
    const Kernels *kernels = find_kernels(instructions, &found);
    if (kernels == nullptr) return false;
    try {
        PaddedMatrix padded_x(rows, width), tiles(1, static_cast<int>(kernels->tile_numbers(rows, width) / 2));
        PaddedMatrix scratch(1, static_cast<int>(kernels->scratch_floats(width)));
        for (int row = 0; row < rows; ++row)
            std::copy_n(x + static_cast<std::size_t>(row) * width, width, padded_x[row]);
        const Activations activations{padded_x[0], padded_x.stride, rows, reinterpret_cast<std::uint16_t *>(tiles[0])};
        for (int begin = 0; kernels->split != nullptr && begin < rows; begin += INPUT_ROWS)
            kernels->split(activations, begin, std::min(INPUT_ROWS, rows - begin), width,
                           reinterpret_cast<std::uint16_t *>(tiles[0]));
        kernels->matmul({*matrix, 0, outputs, width}, activations, out, outputs, scratch[0]);
    } catch (const std::exception &) {
        return false;
    }
    return true;
}

// Unpacks one row of a matrix to padded(width) floats with the kernels called `instructions`; returns false if this
// processor does not support them.
LLAMA2_EXPORT bool llama2_unpack_row(const Matrix *matrix, int row, int width, const char *instructions, float *out) {
    const char *found;
    const Kernels *kernels = find_kernels(instructions, &found);
    if (kernels == nullptr) return false;
    kernels->unpack(*matrix, row, width, out);
    return true;
}

// Requests huge pages of 2 MiB, which need only a few percent of the processor's page-table lookups.
LLAMA2_EXPORT void llama2_use_huge_pages(void *memory, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const std::uintptr_t page = 4096, begin = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) / page * page;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / page * page;
    // Advice only: a system without huge pages rejects it, and nothing changes.
    if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Returns the bytes per second at which `threads` threads read the memory once: the upper limit for decoding.
LLAMA2_EXPORT double llama2_read_bandwidth(const void *memory, std::size_t bytes, int threads) {
    const char *found;
    const Kernels *kernels = find_kernels("", &found);
    if (kernels == nullptr) return 0;
    constexpr std::size_t chunk = 1 << 18;
    std::atomic<std::size_t> next{0};
    std::atomic<std::uint64_t> sink{0};  // keeps the compiler from removing the reads
    const auto read = [&] {
        for (std::size_t at; (at = next.fetch_add(chunk)) + chunk <= bytes;)
            sink ^= kernels->read(reinterpret_cast<const std::uint64_t *>(static_cast<const char *>(memory) + at),
                                  chunk);
    };
    const auto started_at = std::chrono::steady_clock::now();
    std::vector<std::thread> readers;
    for (int index = 1; index < threads; ++index) readers.emplace_back(read);
    read();
    for (std::thread &reader : readers) reader.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started_at;
    return static_cast<double>(bytes / chunk * chunk) / seconds.count();
}
