// Matmul kernels: activations times a weight matrix, where nearly all of the time is spent.
// kernels.hpp includes this file once per instruction set.

constexpr int PREFILL_ROWS = 48, OUTPUT_BLOCK = 4;
constexpr std::size_t PREFETCH_DISTANCE = 3072;  // weights: far enough to arrive in time, near enough to stay cached

// The sums of a block: ROWS rows of x times OUTPUTS rows of the matrix. Unrolled loops keep them in registers.
template <int ROWS, int OUTPUTS>
struct BlockSums {
    Vector sums[OUTPUTS][ROWS];

    __attribute__((always_inline)) BlockSums() {
#pragma GCC unroll 4
        for (int output = 0; output < OUTPUTS; ++output)
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) sums[output][row] = broadcast(0);
    }

    // Adds the products of one vector of weights per output and of x from `from` on.
    __attribute__((always_inline)) void add(const Vector (&w)[OUTPUTS], const float *from, std::size_t stride) {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            const Vector activations = keep_in_register(load(from + row * stride));
#pragma GCC unroll 4
            for (int output = 0; output < OUTPUTS; ++output)
                sums[output][row] = fma(w[output], activations, sums[output][row]);
        }
    }

    __attribute__((always_inline)) void write(float factor, float *out, std::size_t out_stride) const {
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int output = 0; output < OUTPUTS; ++output)
                out[row * out_stride + output] = sum(sums[output][row]) * factor;
    }
};

// Multiplies ROWS rows of x by OUTPUTS rows of the matrix; prefetches from `prefetch_from`.
template <int ROWS, int OUTPUTS>
void matmul_block(const Half *weights, const Half *prefetch_from, int width, const float *x, std::size_t stride,
                  float *out, std::size_t out_stride) {
    BlockSums<ROWS, OUTPUTS> sums;
    Vector w[OUTPUTS];
    int i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {  // a cache line of each row
        for (int output = 0; output < OUTPUTS; ++output) {
            // Prefetching in memory order, not row order, and into the L2 cache is twice as fast as either alternative.
            __builtin_prefetch(prefetch_from + OUTPUTS * i + output * 2 * LANES, 0, 2);
            w[output] = load(weights + static_cast<std::size_t>(output) * width + i);
        }
        sums.add(w, x + i, stride);
        for (int output = 0; output < OUTPUTS; ++output)
            w[output] = load(weights + static_cast<std::size_t>(output) * width + i + LANES);
        sums.add(w, x + i + LANES, stride);
    }
    for (; i < width; i += LANES) {
#pragma GCC unroll 4
        for (int output = 0; output < OUTPUTS; ++output)
            w[output] =
                load_partial(weights + static_cast<std::size_t>(output) * width + i, std::min(LANES, width - i));
        sums.add(w, x + i, stride);
    }
    sums.write(1, out, out_stride);
}

// Indexed by the number of rows - 1. As many sums as possible stay in the registers.
using Block = decltype(&matmul_block<1, 1>);
#if defined(LLAMA2_AVX512)
template <int OUTPUTS>
constexpr Block BLOCKS[] = {matmul_block<1, OUTPUTS>, matmul_block<2, OUTPUTS>, matmul_block<3, OUTPUTS>,
                            matmul_block<4, OUTPUTS>, matmul_block<5, OUTPUTS>, matmul_block<6, OUTPUTS>};
constexpr int MAX_BLOCK_ROWS = 6, MAX_BLOCK_OUTPUTS = 4;
#else
template <int OUTPUTS>
constexpr Block BLOCKS[] = {matmul_block<1, OUTPUTS>, matmul_block<2, OUTPUTS>, matmul_block<3, OUTPUTS>};
constexpr int MAX_BLOCK_ROWS = 3, MAX_BLOCK_OUTPUTS = 2;
#endif

// One row reads the weights in memory order, one output after another, so that the processor's hardware prefetcher helps
// too. Two and three rows still wait for memory rather than for arithmetic, and read fewer outputs at a time.
inline int block_outputs_for(int rows) { return rows == 1 ? 1 : rows <= 3 ? 2 : MAX_BLOCK_OUTPUTS; }

inline const Block *blocks_of(int outputs) {
    return outputs == 1 ? BLOCKS<1> : outputs == 2 ? BLOCKS<2> : BLOCKS<MAX_BLOCK_OUTPUTS>;
}

// out[row][output] = x[row] . weights[output]; x is zero from `width` to the next multiple of 16. More rows than one
// block takes are split into passes of nearly equal size; all passes except the first find the weights in the cache.
// `next` is the memory to prefetch, or null for the memory behind the weights.
void matmul(const Half *weights, int outputs, int width, const float *x, std::size_t stride, int rows, float *out,
            std::size_t out_stride, const Half *next = nullptr) {
    const int passes = (rows + MAX_BLOCK_ROWS - 1) / MAX_BLOCK_ROWS;
    const int block_outputs = block_outputs_for(rows);
    while (outputs > 0) {
        const int count = outputs >= block_outputs ? block_outputs : 1;
        const std::size_t size = static_cast<std::size_t>(count) * width;
        // This thread usually reads the following memory next, even beyond these weights (see ThreadPool::chunk_at). A
        // prefetch beyond the end of the last weight does nothing.
        const Half *prefetch_from = weights + (count == 1 ? PREFETCH_DISTANCE : std::max(size, PREFETCH_DISTANCE));
        if (next != nullptr) prefetch_from = std::exchange(next, next + size);
        for (int pass = 0; pass < passes; ++pass) {
            const int begin = rows * pass / passes, end = rows * (pass + 1) / passes;
            blocks_of(count)[end - begin - 1](weights, prefetch_from, width, x + begin * stride, stride,
                                              out + begin * out_stride, out_stride);
        }
        weights += size;
        out += count;
        outputs -= count;
    }
}
