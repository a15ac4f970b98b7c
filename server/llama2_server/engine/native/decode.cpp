// The steps of a Llama on a CPU: float16 weights, float32 everything else, one to many rows at once. In a decode step
// each row is the next token of another sequence; in a prefill step all are tokens of one prompt.
//
// Decoding reads every weight once a token, so the memory is the limit and everything is about keeping it busy:
// weights are streamed as they lie there with what comes next prefetched, all sequences of a step share the one pass over
// them, and the threads take the work in small chunks, so that one that loses its core delays nobody. A prompt's tokens
// share that pass too; with so many rows the arithmetic is the limit, and matmul.hpp keeps that busy.
//
// Every number is the same bit for bit whatever the number of threads, the rows beside it and the instruction set: each
// sum has 16 lanes that are added up in one fixed order, and sums are never split between threads.
//
// The model is that of Touvron et al. 2023 (arXiv:2307.09288), with transformers' conventions; `model.py` has the same
// step in torch. Plain C at the border: Python calls it through ctypes, and nothing of torch is needed to build it.
//
// This file is the border; decoder.hpp has the stages of a step, thread_pool.hpp the threads, and kernels.hpp what computes: it
// is compiled once for each instruction set, and the processor decides at run time (as Google's Highway does it).

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "no kernels for this processor; the server runs its torch path there"
#endif
#if defined(__linux__)
#include <sys/mman.h>
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
#include "kernels.hpp"
LLAMA2_END
#undef LLAMA2_INSTRUCTIONS
#define LLAMA2_INSTRUCTIONS avx512
#define LLAMA2_AVX512
LLAMA2_BEGIN("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#include "kernels.hpp"
LLAMA2_END
#else
#define LLAMA2_INSTRUCTIONS neon
#include "kernels.hpp"
#endif

namespace {

// The kernels called `name` ("" = the best there are), or null where the processor lacks them.
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

// Grows with every change of what Python sees, so that a library from before it is not called with other arguments.
LLAMA2_EXPORT int llama2_interface() { return 2; }

// The instruction set that `name` ("" = the best) stands for, or null where this processor lacks it.
LLAMA2_EXPORT const char *llama2_instructions(const char *name) {
    const char *found = nullptr;
    find_kernels(name, &found);
    return found;
}

// Null where the processor lacks the instructions or a thread cannot be started.
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

// As many rows as a step can have.
LLAMA2_EXPORT int llama2_decoder_most_rows(const Decoder *decoder) { return decoder->most_rows(); }

// As `Decoder::step`; false where something is out of range.
LLAMA2_EXPORT bool llama2_decoder_step(Decoder *decoder, int rows, const std::int32_t *slots,
                                       const std::int32_t *tokens, const std::int32_t *positions, int wanted,
                                       float *logits) {
    const Model &model = decoder->model();
    const auto within = [](std::int32_t value, std::int32_t end) { return 0 <= value && value < end; };
    if (rows < 1 || rows > decoder->most_rows() || wanted < 0 || wanted > rows) return false;
    for (int row = 0; row < rows; ++row)
        if (!within(slots[row], model.slots) || !within(tokens[row], model.vocab) ||
            !within(positions[row], model.context))
            return false;
    decoder->step(rows, slots, tokens, positions, wanted, logits);
    return true;
}

// Asks for pages of 2 MiB: the processor finds its way in them with a few hundredths of the look-ups.
LLAMA2_EXPORT void llama2_use_huge_pages(void *memory, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const std::uintptr_t page = 4096, begin = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) / page * page;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / page * page;
    // Advice only: a kernel without huge pages says no, and all is as before.
    if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Bytes a second at which so many threads read the memory once: the limit that decoding is measured against.
LLAMA2_EXPORT double llama2_read_bandwidth(const void *memory, std::size_t bytes, int threads) {
    const char *found;
    const Kernels *kernels = find_kernels("", &found);
    if (kernels == nullptr) return 0;
    constexpr std::size_t chunk = 1 << 18;
    std::atomic<std::size_t> next{0};
    std::atomic<std::uint64_t> sink{0};  // so that the compiler cannot leave the reading out
    const auto read = [&] {
        for (std::size_t at; (at = next.fetch_add(chunk)) + chunk <= bytes;)
            sink ^= kernels->read(reinterpret_cast<const std::uint64_t *>(static_cast<const char *>(memory) + at), chunk);
    };
    const auto begun = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int index = 1; index < threads; ++index) others.emplace_back(read);
    read();
    for (std::thread &other : others) other.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begun;
    return static_cast<double>(bytes / chunk * chunk) / seconds.count();
}
