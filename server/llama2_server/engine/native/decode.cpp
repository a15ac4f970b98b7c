// The steps of a Llama on a CPU: float16 weights, float32 everything else, one to many rows at once. In a decode step
// each row is the next token of another sequence; in a prefill step all are tokens of one prompt.
//
// Decoding reads every weight once a token, so the memory is the limit and the whole file is about keeping it busy:
// weights are streamed in blocks of a few matrix rows with the next block prefetched, all sequences of a step share the
// one pass over them, and the threads take the work in small chunks, so that one that loses its core delays nobody.
//
// Every number is the same bit for bit whatever the number of threads, the rows beside it and the instruction set: each
// sum has 16 lanes that are added up in one fixed order, and sums are never split between threads.
//
// The model is that of Touvron et al. 2023 (arXiv:2307.09288), with transformers' conventions; `model.py` has the same
// step in torch. Plain C at the border: Python calls it through ctypes, and nothing of torch is needed to build it.
//
// The file includes itself once for each instruction set, with the compiler switched to that set: the lower half is
// compiled several times, the upper half once, and the processor decides at run time (as Google's Highway does it).

#ifndef LLAMA2_INSTRUCTIONS

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
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

#define LLAMA2_EXPORT extern "C" __attribute__((visibility("default")))

using Half = std::uint16_t;  // the bits of an IEEE float16; kernels widen whole vectors of them

// The structs that Python fills (`native/__init__.py` mirrors them, field by field).
struct Layer {
    const Half *attention_norm, *qkv, *output, *mlp_norm, *gate_up, *down;
    Half *keys, *values;  // (slots, kv_heads, context, head_dim)
};

struct Model {
    std::int32_t vocab, hidden, inner, layers, heads, kv_heads, head_dim, context, slots;
    float norm_epsilon;
    const Half *embedding, *norm, *head;
    const float *cosines, *sines;  // (context, head_dim); the sine's sign for a head's first half is folded in
};

namespace {

constexpr int LANES = 16;  // partial sums of every dot product
constexpr int CHUNK_BYTES = 1 << 18;  // of weights: some 20 microseconds of reading, a hundred times what taking one costs
constexpr int PREFILL_ROWS = 24;  // tokens of a prompt in a step: more would not find one another's activations in the cache
constexpr std::size_t PREFETCH_DISTANCE = 4096;  // weights: far enough to be there in time where rows are short
// How long a thread watches for work before it sleeps: longer than a chunk takes, too short to warm an idle machine.
constexpr auto SPIN_TIME = std::chrono::microseconds(50);

constexpr int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

// One row's attention to one key head.
struct Attention {
    const float *queries, *key, *value;  // (group, head_dim), (head_dim), (head_dim): before the rotary embedding
    const float *cosines, *sines;        // of this position
    Half *keys, *values;                 // (context, head_dim): this head's part of the KV cache
    int position, group, head_dim;
    float *out;      // (group, head_dim)
    float *scratch;  // of the thread
};

// What each instruction set offers.
struct Kernels {
    void (*multiply)(const Half *weights, int outputs, int width, const float *x, std::size_t stride, int rows,
                     float *out, std::size_t out_stride);
    void (*normalise)(const float *x, const Half *weights, int width, float epsilon, float *out);
    void (*gate)(const float *gates, const float *ups, int count, float *out);
    void (*remember)(const Attention &attention);  // adds key and value to the KV cache
    void (*attend)(const Attention &attention);
    void (*widen)(const Half *from, int count, float *to);
    std::uint64_t (*read)(const std::uint64_t *memory, std::size_t bytes);
};

// e^x to 2 units in the last place (Cephes' expf), in operations that the compiler can do on whole vectors.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shifted = std::fma(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
    const float n = shifted - 12582912.0f;
    const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    for (const float coefficient :
         {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f})
        p = std::fma(p, r, coefficient);
    std::uint32_t bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

}  // namespace

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
#include "decode.cpp"
LLAMA2_END
#undef LLAMA2_INSTRUCTIONS
#define LLAMA2_INSTRUCTIONS avx512
#define LLAMA2_AVX512
LLAMA2_BEGIN("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#include "decode.cpp"
LLAMA2_END
#else
#define LLAMA2_INSTRUCTIONS neon
#include "decode.cpp"
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

// Threads that take chunks of one stage after another.
//
// One word says which stage it is and how many of its chunks nobody has taken yet. Whoever finishes the last chunk of a
// stage opens the next one. So nothing waits for a thread, only for chunks: one whose core went to another process
// holds up nobody, unless that happens within a chunk. The stage number never comes again, so a thread that slept
// through half a step cannot take a chunk of another stage than it saw.
class Team {
  public:
    explicit Team(int threads) {
        try {
            for (int index = 1; index < threads; ++index) workers_.emplace_back([this, index] { help(index, dismissed_); });
        } catch (const std::system_error &) {
            // The system gives no more threads: those there are do all the work.
        }
    }

    // Nothing runs any more, so the workers need nothing of the derived class, which is gone already.
    virtual ~Team() {
        dismissed_.store(true);
        announce((ticket_.load() | TAKEN) + 1);
        for (std::thread &worker : workers_) worker.join();
    }

  protected:
    virtual void run_chunk(int thread, int chunk) = 0;
    virtual int next_stage() = 0;  // prepares the next stage and returns its number of chunks; 0 ends the run

    // Run stages until `next_stage` returns 0; the calling thread is thread 0.
    void run() {
        finished_.store(false);
        open();
        help(0, finished_);
    }

  private:
    static constexpr std::uint64_t TAKEN = (1u << 24) - 1;  // the part of a ticket that counts chunks

    void help(int thread, const std::atomic<bool> &over) {
        for (;;) {
            std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
            // In this order: `over` is set before the last ticket, so whoever waits on that one would wait for ever.
            if (over.load(std::memory_order_acquire)) return;
            if ((ticket & TAKEN) == 0) {
                wait(ticket);
            } else if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
                run_chunk(thread, static_cast<int>((ticket & TAKEN) - 1));
                if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) open();
            }
        }
    }

    void open() {
        const int chunks = next_stage();
        unfinished_.store(chunks, std::memory_order_relaxed);
        if (chunks == 0) finished_.store(true, std::memory_order_release);
        announce(((ticket_.load(std::memory_order_relaxed) | TAKEN) + 1) + static_cast<std::uint64_t>(chunks));
    }

    void announce(std::uint64_t ticket) {
        ticket_.store(ticket);
        if (sleepers_.load() == 0) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }

    void wait(std::uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + SPIN_TIME;
        do {
            for (int turn = 0; turn < 16; ++turn) {
                if (ticket_.load(std::memory_order_acquire) != seen) return;
#if defined(__x86_64__)
                _mm_pause();
#else
                asm volatile("yield");
#endif
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return ticket_.load() != seen; });
        sleepers_.fetch_sub(1);
    }

    std::atomic<std::uint64_t> ticket_{0};
    std::atomic<int> unfinished_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> finished_{true}, dismissed_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

// Rows of floats, padded with zeros to whole vectors, each at the start of a cache line: a vector that lies across two
// lines costs two reads.
class Rows {
  public:
    Rows(int rows, int width)
        // One line more, so that the stride is no power of two: else all rows would share a place in the nearest cache.
        : stride(padded(width) + LANES), lines_(static_cast<std::size_t>(rows) * stride / LANES) {}
    float *operator[](int row) { return lines_.data()->lanes + static_cast<std::size_t>(row) * stride; }
    const std::size_t stride;

  private:
    struct alignas(64) Line {
        float lanes[LANES];
    };
    std::vector<Line> lines_;
};

}  // namespace

// A model, its threads and the activations of one step.
class Decoder final : Team {
  public:
    Decoder(const Model &model, const Layer *layers, const Kernels &kernels, int threads)
        : Team(threads),
          model_(model),
          layers_(layers, layers + model.layers),
          kernels_(kernels),
          threads_(threads),
          most_rows_(std::max(model.slots, PREFILL_ROWS)),
          query_width_(model.heads * model.head_dim),
          key_width_(model.kv_heads * model.head_dim),
          x_(most_rows_, model.hidden),
          normed_(most_rows_, model.hidden),
          change_(most_rows_, model.hidden),
          qkv_(most_rows_, query_width_ + 2 * key_width_),
          attended_(most_rows_, query_width_),
          gate_up_(most_rows_, 2 * model.inner),
          inner_(most_rows_, model.inner),
          // What `Kernels::attend` needs: queries, sums and scores of a group of heads.
          scratch_(threads, group() * (2 * padded(model.head_dim) + padded(model.context))) {}

    // Appends one token to each row's slot. The last `wanted` rows get logits (wanted, vocab). Rows of the same slot come
    // in the order of their positions.
    void step(int rows, const std::int32_t *slots, const std::int32_t *tokens, const std::int32_t *positions,
              int wanted, float *logits) {
        rows_ = rows;
        wanted_ = wanted;
        slots_ = slots;
        positions_ = positions;
        logits_ = logits;
        for (int row = 0; row < rows; ++row) {
            const Half *embedded = model_.embedding + static_cast<std::size_t>(tokens[row]) * model_.hidden;
            kernels_.widen(embedded, model_.hidden, x_[row]);
        }
        stage_ = -1;
        run();
    }

    const Model &model() const { return model_; }
    int most_rows() const { return most_rows_; }

  private:
    enum Kind { QKV, ATTEND, OUTPUT, GATE_UP, DOWN, STAGES_OF_A_LAYER };

    int group() const { return model_.heads / model_.kv_heads; }
    const Layer &layer() const { return layers_[stage_ / STAGES_OF_A_LAYER]; }

    int next_stage() override {
        if (++stage_ == STAGES_OF_A_LAYER * model_.layers) {
            if (wanted_ == 0) return 0;
            add_change();
            normalise(model_.norm);
            return split(model_.vocab, model_.hidden);
        }
        if (stage_ > STAGES_OF_A_LAYER * model_.layers) return 0;
        switch (stage_ % STAGES_OF_A_LAYER) {
            case QKV:
                if (stage_ > 0) add_change();
                normalise(layer().attention_norm);
                return split(query_width_ + 2 * key_width_, model_.hidden);
            case ATTEND:
                // All rows first: those of a prompt attend to one another.
                for (int row = 0; row < rows_; ++row)
                    for (int head = 0; head < model_.kv_heads; ++head) kernels_.remember(attention(0, row, head));
                return rows_ * model_.kv_heads;
            case OUTPUT:
                return split(model_.hidden, query_width_);
            case GATE_UP:
                add_change();
                normalise(layer().mlp_norm);
                return split(model_.inner, 2 * model_.hidden);
            default:
                return split(model_.hidden, model_.inner);
        }
    }

    void run_chunk(int thread, int chunk) override {
        const int begin = chunk * outputs_per_chunk_;
        if (stage_ == STAGES_OF_A_LAYER * model_.layers)
            return multiply(model_.head, model_.vocab, normed_, model_.hidden, begin, logits_, model_.vocab, wanted_);
        switch (stage_ % STAGES_OF_A_LAYER) {
            case QKV:
                return multiply(layer().qkv, query_width_ + 2 * key_width_, normed_, model_.hidden, begin, qkv_[0],
                                qkv_.stride, rows_);
            case ATTEND:
                return kernels_.attend(attention(thread, chunk / model_.kv_heads, chunk % model_.kv_heads));
            case OUTPUT:
                return multiply(layer().output, model_.hidden, attended_, query_width_, begin, change_[0],
                                change_.stride, rows_);
            case GATE_UP:
                return gate_up(begin);
            default:
                return multiply(layer().down, model_.hidden, inner_, model_.inner, begin, change_[0], change_.stride, rows_);
        }
    }

    // How many chunks a matrix of so many outputs, each of so many weights, comes in.
    int split(int outputs, int width) {
        int per_chunk = outputs;
        if (threads_ > 1) {
            per_chunk = std::min(CHUNK_BYTES / static_cast<int>(width * sizeof(Half)), outputs / (4 * threads_));
            per_chunk = std::max(per_chunk / 4, 1) * 4;  // whole blocks
        }
        outputs_per_chunk_ = per_chunk;
        return (outputs + per_chunk - 1) / per_chunk;
    }

    // The last `rows` of `x` times outputs_per_chunk_ rows of the matrix, from `begin` on.
    void multiply(const Half *weights, int outputs, Rows &x, int width, int begin, float *out, std::size_t out_stride,
                  int rows) {
        const int count = std::min(outputs_per_chunk_, outputs - begin);
        kernels_.multiply(weights + static_cast<std::size_t>(begin) * width, count, width, x[rows_ - rows], x.stride,
                          rows, out + begin, out_stride);
    }

    void gate_up(int begin) {
        const int inner = model_.inner, count = std::min(outputs_per_chunk_, inner - begin);
        multiply(layer().gate_up, inner, normed_, model_.hidden, begin, gate_up_[0], gate_up_.stride, rows_);
        multiply(layer().gate_up + static_cast<std::size_t>(inner) * model_.hidden, inner, normed_, model_.hidden,
                 begin, gate_up_[0] + inner, gate_up_.stride, rows_);
        for (int row = 0; row < rows_; ++row) {
            const float *gates = gate_up_[row] + begin;
            kernels_.gate(gates, gates + inner, count, inner_[row] + begin);
        }
    }

    Attention attention(int thread, int row, int head) {
        const int dim = model_.head_dim, position = positions_[row];
        const std::size_t cached = static_cast<std::size_t>(slots_[row]) * model_.kv_heads + head;
        const std::size_t offset = cached * model_.context * dim;
        const float *key = qkv_[row] + query_width_ + head * dim;
        Attention attention;
        attention.queries = qkv_[row] + head * group() * dim;
        attention.key = key;
        attention.value = key + key_width_;
        attention.cosines = model_.cosines + static_cast<std::size_t>(position) * dim;
        attention.sines = model_.sines + static_cast<std::size_t>(position) * dim;
        attention.keys = layer().keys + offset;
        attention.values = layer().values + offset;
        attention.position = position;
        attention.group = group();
        attention.head_dim = dim;
        attention.out = attended_[row] + head * group() * dim;
        attention.scratch = scratch_[thread];
        return attention;
    }

    void add_change() {
        for (int row = 0; row < rows_; ++row) {
            float *x = x_[row];
            const float *change = change_[row];
            for (int i = 0; i < model_.hidden; ++i) x[i] += change[i];
        }
    }

    void normalise(const Half *weights) {
        for (int row = 0; row < rows_; ++row)
            kernels_.normalise(x_[row], weights, model_.hidden, model_.norm_epsilon, normed_[row]);
    }

    const Model model_;
    const std::vector<Layer> layers_;
    const Kernels &kernels_;
    const int threads_, most_rows_, query_width_, key_width_;
    Rows x_, normed_, change_, qkv_, attended_, gate_up_, inner_, scratch_;
    // The step under way. Written by whoever opens a stage, before its ticket; read after a chunk of it was taken.
    int rows_ = 0, wanted_ = 0, stage_ = 0, outputs_per_chunk_ = 0;
    const std::int32_t *slots_ = nullptr, *positions_ = nullptr;
    float *logits_ = nullptr;
};

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

#else  // LLAMA2_INSTRUCTIONS: from here on, once for each instruction set

namespace {
namespace LLAMA2_INSTRUCTIONS {

// Sixteen floats, in as many registers as it takes, and what there is to do with them.
#if defined(LLAMA2_AVX512)
using Vector = __m512;
inline Vector all(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float *from) { return _mm512_loadu_ps(from); }
inline Vector load(const Half *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
inline void store(float *to, Vector v) { _mm512_storeu_ps(to, v); }
inline void store(Half *to, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline __m256 halves(Vector v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
#elif defined(__x86_64__)
struct Vector {
    __m256 low, high;
};
inline Vector all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vector load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Vector load(const Half *from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 8)))};
}
inline void store(float *to, Vector v) {
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
}
inline void store(Half *to, Vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}
inline Vector fma(Vector a, Vector b, Vector c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline __m256 halves(Vector v) { return _mm256_add_ps(v.low, v.high); }
#else
struct Vector {
    float32x4_t part[4];
};
inline Vector all(float value) {
    const float32x4_t part = vdupq_n_f32(value);
    return {{part, part, part, part}};
}
inline Vector load(const float *from) {
    return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
}
inline Vector load(const Half *from) {
    Vector v;
    for (int i = 0; i < 4; ++i) v.part[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i)));
    return v;
}
inline void store(float *to, Vector v) {
    for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, v.part[i]);
}
inline void store(Half *to, Vector v) {
    for (int i = 0; i < 4; ++i) vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.part[i])));
}
inline Vector fma(Vector a, Vector b, Vector c) {
    for (int i = 0; i < 4; ++i) c.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
    return c;
}
#endif

// The sum of all lanes: 16 -> 8 -> 4 -> 2 -> 1, the upper half onto the lower.
#if defined(__x86_64__)
inline float sum(Vector v) {
    const __m256 eight = halves(v);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float sum(Vector v) {
    const float32x4_t low = vaddq_f32(v.part[0], v.part[2]), high = vaddq_f32(v.part[1], v.part[3]);
    const float32x4_t four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
#endif

// The last numbers of a row whose width is no multiple of 16, zeros after them.
inline Vector load_some(const Half *from, int count) {
    Half whole[LANES] = {};
    std::memcpy(whole, from, count * sizeof(Half));
    return load(whole);
}

inline void store_some(Half *to, Vector v, int count) {
    Half whole[LANES];
    store(whole, v);
    std::memcpy(to, whole, count * sizeof(Half));
}

// ROWS rows of x times OUTPUTS rows of the matrix, all sums in registers; touches `ahead`, the block after this one.
template <int ROWS, int OUTPUTS>
void multiply_block(const Half *weights, const Half *ahead, int width, const float *x, std::size_t stride, float *out,
                    std::size_t out_stride) {
    Vector sums[OUTPUTS][ROWS];  // in registers: hence each loop over them is unrolled
#pragma GCC unroll 4
    for (int output = 0; output < OUTPUTS; ++output)
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) sums[output][row] = all(0);
    const auto add = [&](const Vector(&w)[OUTPUTS], int i) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            const Vector activations = load(x + row * stride + i);
#pragma GCC unroll 4
            for (int output = 0; output < OUTPUTS; ++output)
                sums[output][row] = fma(w[output], activations, sums[output][row]);
        }
    };
    Vector w[OUTPUTS];
    int i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {  // a cache line of each row
        for (int output = 0; output < OUTPUTS; ++output) {
            // In the order of the memory, not of the rows, and into the second-level cache: twice as fast as either other.
            __builtin_prefetch(ahead + OUTPUTS * i + output * 2 * LANES, 0, 2);
            w[output] = load(weights + static_cast<std::size_t>(output) * width + i);
        }
        add(w, i);
        for (int output = 0; output < OUTPUTS; ++output)
            w[output] = load(weights + static_cast<std::size_t>(output) * width + i + LANES);
        add(w, i + LANES);
    }
    for (; i < width; i += LANES) {
#pragma GCC unroll 4
        for (int output = 0; output < OUTPUTS; ++output)
            w[output] = load_some(weights + static_cast<std::size_t>(output) * width + i, std::min(LANES, width - i));
        add(w, i);
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int output = 0; output < OUTPUTS; ++output) out[row * out_stride + output] = sum(sums[output][row]);
}

struct Blocking {
    int outputs;  // in a block
    decltype(&multiply_block<1, 1>) block, single;
};

template <int ROWS, int OUTPUTS>
constexpr Blocking blocking() {
    return {OUTPUTS, multiply_block<ROWS, OUTPUTS>, multiply_block<ROWS, 1>};
}

// By the number of rows: as many sums as there are registers for. One row needs no more than hides the latency.
#if defined(LLAMA2_AVX512)
constexpr Blocking BLOCKINGS[] = {blocking<1, 2>(), blocking<2, 4>(), blocking<3, 4>(),
                                  blocking<4, 4>(), blocking<5, 4>(), blocking<6, 4>()};
#else
constexpr Blocking BLOCKINGS[] = {blocking<1, 2>(), blocking<2, 2>(), blocking<3, 2>()};
#endif
constexpr int MOST_ROWS = sizeof BLOCKINGS / sizeof *BLOCKINGS;

// out[row][output] = x[row] . weights[output]; x is zero from `width` to the next multiple of 16. More rows than one
// block takes come in passes of nearly the same size; all but the first find the weights in the cache.
void multiply(const Half *weights, int outputs, int width, const float *x, std::size_t stride, int rows, float *out,
              std::size_t out_stride) {
    const int passes = (rows + MOST_ROWS - 1) / MOST_ROWS, outputs_of_a_block = BLOCKINGS[rows / passes - 1].outputs;
    const Half *end_of_weights = weights + static_cast<std::size_t>(outputs) * width;
    while (outputs > 0) {
        const int count = outputs >= outputs_of_a_block ? outputs_of_a_block : 1;
        const std::size_t size = static_cast<std::size_t>(count) * width;
        const Half *ahead = weights + std::max(size, PREFETCH_DISTANCE);
        // No further than these weights: what follows may be another thread's.
        if (ahead + size > end_of_weights) ahead = weights;
        for (int pass = 0; pass < passes; ++pass) {
            const int begin = rows * pass / passes, end = rows * (pass + 1) / passes;
            const Blocking &blocking = BLOCKINGS[end - begin - 1];
            (count == 1 ? blocking.single : blocking.block)(weights, ahead, width, x + begin * stride, stride,
                                                            out + begin * out_stride, out_stride);
        }
        weights += size;
        out += count;
        outputs -= count;
    }
}

void widen(const Half *from, int count, float *to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) store(to + i, load_some(from + i, count - i));
}

// RMSNorm (Zhang and Sennrich 2019).
void normalise(const float *x, const Half *weights, int width, float epsilon, float *out) {
    Vector squares = all(0);
    for (int i = 0; i < width; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const float scale = 1 / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
    widen(weights, width, out);
    for (int i = 0; i < width; ++i) out[i] *= x[i] * scale;
}

// SwiGLU (Shazeer 2020): silu(gate) * up.
void gate(const float *gates, const float *ups, int count, float *out) {
    for (int i = 0; i < count; ++i) out[i] = gates[i] / (1 + exponential(-gates[i])) * ups[i];
}

// Rotary embedding as transformers' rotate_half has it: a head's first half is paired with its second.
void rotate(const float *x, const Attention &a, float scale, float *out) {
    const int half = a.head_dim / 2;
    for (int i = 0; i < half; ++i) {
        out[i] = (x[i] * a.cosines[i] + x[i + half] * a.sines[i]) * scale;
        out[i + half] = (x[i + half] * a.cosines[i + half] + x[i] * a.sines[i + half]) * scale;
    }
}

void narrow(const float *from, int count, Half *to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i == count) return;
    float last[LANES] = {};
    std::memcpy(last, from + i, (count - i) * sizeof(float));
    store_some(to + i, load(last), count - i);
}

// Turns scores into weights that add up to one.
void softmax(float *scores, int count) {
    float largest = scores[0];
    for (int i = 1; i < count; ++i) largest = std::max(largest, scores[i]);
    for (int i = 0; i < count; ++i) scores[i] = exponential(scores[i] - largest);
    for (int i = count; i < padded(count); ++i) scores[i] = 0;
    Vector total = all(0);
    for (int i = 0; i < count; i += LANES) total = fma(load(scores + i), all(1), total);
    const float scale = 1 / sum(total);
    for (int i = 0; i < count; ++i) scores[i] *= scale;
}

// sums[0 .. 16 * VECTORS) += weights . values, `count` rows of them.
template <int VECTORS>
void weigh(const float *weights, const Half *values, int count, int head_dim, float *sums) {
    Vector v[VECTORS];
    for (int j = 0; j < VECTORS; ++j) v[j] = load(sums + j * LANES);
    for (int i = 0; i < count; ++i, values += head_dim)
        for (int j = 0; j < VECTORS; ++j) v[j] = fma(all(weights[i]), load(values + j * LANES), v[j]);
    for (int j = 0; j < VECTORS; ++j) store(sums + j * LANES, v[j]);
}

void weigh_all(const float *weights, const Half *values, int count, int head_dim, float *sums) {
    int d = 0;
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) weigh<4>(weights, values + d, count, head_dim, sums + d);
    for (; d + LANES <= head_dim; d += LANES) weigh<1>(weights, values + d, count, head_dim, sums + d);
    if (d == head_dim) return;
    Vector last = load(sums + d);
    for (int i = 0; i < count; ++i)
        last = fma(all(weights[i]), load_some(values + static_cast<std::size_t>(i) * head_dim + d, head_dim - d), last);
    store(sums + d, last);
}

void remember(const Attention &a) {
    rotate(a.key, a, 1, a.scratch);
    narrow(a.scratch, a.head_dim, a.keys + static_cast<std::size_t>(a.position) * a.head_dim);
    narrow(a.value, a.head_dim, a.values + static_cast<std::size_t>(a.position) * a.head_dim);
}

void attend(const Attention &a) {
    constexpr int BLOCK = 64;  // positions whose values stay in the nearest cache while all heads of a group use them
    const int dim = a.head_dim, stride = padded(dim), tokens = a.position + 1;
    float *queries = a.scratch, *sums = queries + a.group * stride, *scores = sums + a.group * stride;
    for (int head = 0; head < a.group; ++head)
        rotate(a.queries + head * dim, a, 1 / std::sqrt(static_cast<float>(dim)), queries + head * stride);
    multiply(a.keys, tokens, dim, queries, stride, a.group, scores, padded(tokens));
    std::fill(sums, sums + a.group * stride, 0.0f);
    for (int head = 0; head < a.group; ++head) softmax(scores + head * padded(tokens), tokens);
    for (int begin = 0; begin < tokens; begin += BLOCK)
        for (int head = 0; head < a.group; ++head)
            weigh_all(scores + head * padded(tokens) + begin, a.values + static_cast<std::size_t>(begin) * dim,
                      std::min(BLOCK, tokens - begin), dim, sums + head * stride);
    for (int head = 0; head < a.group; ++head) std::memcpy(a.out + head * dim, sums + head * stride, dim * sizeof(float));
}

std::uint64_t read(const std::uint64_t *memory, std::size_t bytes) {
    std::uint64_t found[8] = {};
    for (std::size_t i = 0; i < bytes / sizeof *memory; i += 8)
        for (int j = 0; j < 8; ++j) found[j] ^= memory[i + j];
    return found[0] ^ found[1] ^ found[2] ^ found[3] ^ found[4] ^ found[5] ^ found[6] ^ found[7];
}

const Kernels kernels = {multiply, normalise, gate, remember, attend, widen, read};

}  // namespace LLAMA2_INSTRUCTIONS
}  // namespace

#endif
