// Products of activations with a matrix: the part of the kernels where nearly all of the time goes.
// Included by kernels.hpp, once for each instruction set.

constexpr std::size_t PREFETCH_DISTANCE = 3072;  // weights: far enough to be there in time, near enough to be there still

// ROWS rows of x times OUTPUTS rows of the matrix, all sums in registers; touches `ahead`, what is read next.
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
            const Vector activations = in_register(load(x + row * stride + i));
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

// By the number of rows: as many sums as there are registers for. One row takes the weights as they lie in the memory, one
// output after another: then the processor reads ahead by itself as well.
#if defined(LLAMA2_AVX512)
constexpr Blocking BLOCKINGS[] = {blocking<1, 1>(), blocking<2, 4>(), blocking<3, 4>(),
                                  blocking<4, 4>(), blocking<5, 4>(), blocking<6, 4>()};
#else
constexpr Blocking BLOCKINGS[] = {blocking<1, 1>(), blocking<2, 2>(), blocking<3, 2>()};
#endif
constexpr int MOST_ROWS = sizeof BLOCKINGS / sizeof *BLOCKINGS;

// out[row][output] = x[row] . weights[output]; x is zero from `width` to the next multiple of 16. More rows than one
// block takes come in passes of nearly the same size; all but the first find the weights in the cache.
void multiply(const Half *weights, int outputs, int width, const float *x, std::size_t stride, int rows, float *out,
              std::size_t out_stride) {
    const int passes = (rows + MOST_ROWS - 1) / MOST_ROWS, outputs_of_a_block = BLOCKINGS[rows / passes - 1].outputs;
    while (outputs > 0) {
        const int count = outputs >= outputs_of_a_block ? outputs_of_a_block : 1;
        const std::size_t size = static_cast<std::size_t>(count) * width;
        // What this thread reads next, which as a rule is what follows in the memory, beyond these weights too (Team). A
        // prefetch beyond the last weight of all does nothing.
        const Half *ahead = weights + (count == 1 ? PREFETCH_DISTANCE : std::max(size, PREFETCH_DISTANCE));
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
