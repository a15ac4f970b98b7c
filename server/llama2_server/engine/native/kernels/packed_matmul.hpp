// Matmul with a packed matrix (packing.hpp). Each weight is decoded to the same float, and each sum has the same order,
// as with float16 rows. Hence the results have the same bits, unless a sum is too small for a normal float32 (2^-126) or
// larger than 2^124. kernels.hpp includes this file once per instruction set.

constexpr std::size_t PACKED_PREFETCH_BYTES = 6144;

struct PackedRow {
    int format;
    const std::uint8_t *codes;
};

inline int base_of(const PackedRow &row, int width, int block) {
    return row.format == TWELVE_BITS_WITH_BASES ? row.codes[bases_offset(width) + block] : 0;
}

// The numbers from `i` on of a row's part that does not fill a block, times CODE_SCALE.
inline Vector load_tail(const PackedRow &row, int width, int i) {
    const int whole = width / BLOCK_WEIGHTS * BLOCK_WEIGHTS;
    const Half *tail = reinterpret_cast<const Half *>(row.codes + width / BLOCK_WEIGHTS * BLOCK_BYTES);
    return multiply(load_partial(tail + i - whole, std::min(LANES, width - i)), broadcast(CODE_SCALE));
}

inline PackedRow packed_row(const Matrix &matrix, int row) {
    const std::uint64_t entry = matrix.rows[row];
    return {static_cast<int>(entry % ROW_ALIGNMENT), matrix.memory + entry / ROW_ALIGNMENT * ROW_ALIGNMENT};
}

// Multiplies ROWS rows of x by OUTPUTS rows of the matrix, none of which is float16.
template <int ROWS, int OUTPUTS, bool BASES>
void packed_block(const PackedRow (&rows)[OUTPUTS], int width, const float *x, std::size_t stride, float *out,
                  std::size_t out_stride) {
    const int blocks = width / BLOCK_WEIGHTS, whole = blocks * BLOCK_WEIGHTS;
    const std::uint8_t *prefetch_from =
        rows[0].codes + std::max<std::size_t>(OUTPUTS == 1 ? 0 : OUTPUTS * bases_offset(width), PACKED_PREFETCH_BYTES);
    BlockSums<ROWS, OUTPUTS> sums;
    Vector w[OUTPUTS];
    for (int block = 0; block < blocks; ++block) {
        Vector scales[OUTPUTS];
#pragma GCC unroll 4
        for (int output = 0; output < OUTPUTS; ++output) {
            for (int line = 0; line < BLOCK_BYTES; line += 64)  // in memory order, as in matmul_block
                __builtin_prefetch(prefetch_from + (block * OUTPUTS + output) * BLOCK_BYTES + line, 0, 2);
            if (BASES) scales[output] = broadcast(power_of_two(base_of(rows[output], width, block)));
        }
#pragma GCC unroll 8
        for (int index = 0; index < BLOCK_WEIGHTS / LANES; ++index) {
#pragma GCC unroll 4
            for (int output = 0; output < OUTPUTS; ++output) {
                w[output] = widen(load_codes(rows[output].codes + block * BLOCK_BYTES, index));
                if (BASES) w[output] = multiply(w[output], scales[output]);
            }
            sums.add(w, x + block * BLOCK_WEIGHTS + index * LANES, stride);
        }
    }
    for (int i = whole; i < width; i += LANES) {
#pragma GCC unroll 4
        for (int output = 0; output < OUTPUTS; ++output) w[output] = load_tail(rows[output], width, i);
        sums.add(w, x + i, stride);
    }
    sums.write(1.0f / CODE_SCALE, out, out_stride);
}

// Calls `use` with each vector of a packed row, times CODE_SCALE, and its index.
template <typename Use>
void for_each_vector(const PackedRow &row, int width, const Use &use) {
    const int whole = width / BLOCK_WEIGHTS * BLOCK_WEIGHTS;
    for (int i = 0; i < whole; i += LANES) {
        const int block = i / BLOCK_WEIGHTS;
        const Vector scale = broadcast(power_of_two(base_of(row, width, block)));
        use(multiply(widen(load_codes(row.codes + block * BLOCK_BYTES, i % BLOCK_WEIGHTS / LANES)), scale), i);
    }
    for (int i = whole; i < width; i += LANES) use(load_tail(row, width, i), i);
}

void unpack(const Matrix &matrix, int row, int width, float *out) {
    const std::size_t offset = matrix.rows == nullptr ? static_cast<std::size_t>(row) * width * sizeof(Half) : 0;
    const PackedRow found = matrix.rows == nullptr ? PackedRow{FLOAT16, matrix.memory + offset} : packed_row(matrix, row);
    if (found.format == FLOAT16) return widen(reinterpret_cast<const Half *>(found.codes), width, out);
    const Vector scale = broadcast(1.0f / CODE_SCALE);
    for_each_vector(found, width, [&](Vector w, int i) { store(out + i, multiply(w, scale)); });
}

// Writes a packed row as float16 and returns the factor that turns these numbers into the weights: without bases the
// numbers are written times CODE_SCALE, which takes no arithmetic.
float unpack_halves(const PackedRow &row, int width, Half *out) {
    if (row.format == TWELVE_BITS && width % BLOCK_WEIGHTS == 0) {
        for (int block = 0; block < width / BLOCK_WEIGHTS; ++block)
#pragma GCC unroll 8
            for (int index = 0; index < BLOCK_WEIGHTS / LANES; ++index)
                store(out + block * BLOCK_WEIGHTS + index * LANES, load_codes(row.codes + block * BLOCK_BYTES, index));
        return 1.0f / CODE_SCALE;
    }
    const Vector scale = broadcast(1.0f / CODE_SCALE);
    for_each_vector(row, width, [&](Vector w, int i) {
        store_partial(out + i, multiply(w, scale), std::min(LANES, width - i));
    });
    return 1;
}

// Returns how many of the rows, the first included, are float16 and follow one another without gaps.
int float16_run(const MatrixRows &weights, int first) {
    const std::size_t bytes = weights.width * sizeof(Half);
    const std::uint64_t *entries = weights.matrix.rows + weights.begin;
    int end = first;
    while (end < weights.outputs && entries[end] == entries[first] + (end - first) * bytes &&
           entries[end] % ROW_ALIGNMENT == FLOAT16)
        ++end;
    return end - first;
}

// Returns how many rows, at most `limit`, are packed before the next float16 row.
int packed_run(const MatrixRows &weights, int first, int limit) {
    int end = first;
    while (end < weights.outputs && end - first < limit &&
           weights.matrix.rows[weights.begin + end] % ROW_ALIGNMENT != FLOAT16)
        ++end;
    return end - first;
}

// Multiplies ROWS rows of x by up to OUTPUTS packed rows of the matrix and returns their number.
template <int ROWS, int OUTPUTS>
int packed_dots(const MatrixRows &weights, int first, const float *x, std::size_t stride, float *out,
                std::size_t out_stride) {
    PackedRow rows[OUTPUTS];
    const int count = packed_run(weights, first, OUTPUTS);
    bool bases = false;
    for (int i = 0; i < count; ++i) {
        rows[i] = packed_row(weights.matrix, weights.begin + first + i);
        bases |= rows[i].format == TWELVE_BITS_WITH_BASES;
    }
    if (count == OUTPUTS && !bases) {
        packed_block<ROWS, OUTPUTS, false>(rows, weights.width, x, stride, out, out_stride);
        return count;
    }
    for (int i = 0; i < count; ++i) {
        const PackedRow single[1] = {rows[i]};
        (rows[i].format == TWELVE_BITS ? packed_block<ROWS, 1, false> : packed_block<ROWS, 1, true>)(
            single, weights.width, x, stride, out + i, out_stride);
    }
    return count;
}

// Indexed by the number of rows - 1: as many sums as fit in the registers, next to the weights. Decoding in registers is
// faster than `unpack_and_multiply` up to the last of them.
#if defined(LLAMA2_AVX512)
constexpr decltype(&packed_dots<1, 1>) PACKED_DOTS[] = {
    packed_dots<1, 2>, packed_dots<2, 3>, packed_dots<3, 3>, packed_dots<4, 3>,
    packed_dots<5, 3>, packed_dots<6, 3>, packed_dots<7, 3>, packed_dots<8, 3>};
#else
constexpr decltype(&packed_dots<1, 1>) PACKED_DOTS[] = {packed_dots<1, 2>, packed_dots<2, 2>};
#endif
constexpr int MAX_PACKED_ROWS = sizeof PACKED_DOTS / sizeof *PACKED_DOTS;

// Multiplies many rows of x by `count` packed rows. They use the unpacked weights while these are in the cache.
void unpack_and_multiply(const MatrixRows &weights, int first, int count, const float *x, std::size_t stride, int rows,
                         float *out, std::size_t out_stride, Half *unpacked) {
    float factors[UNPACKED_ROWS];
    for (int i = 0; i < count; ++i)
        factors[i] = unpack_halves(packed_row(weights.matrix, weights.begin + first + i), weights.width,
                                   unpacked + static_cast<std::size_t>(i) * weights.width);
    // The rows behind these arrive while this thread computes.
    const std::uint8_t *next = packed_row(weights.matrix, weights.begin + first).codes + count * bases_offset(weights.width);
    matmul(unpacked, count, weights.width, x, stride, rows, out, out_stride, reinterpret_cast<const Half *>(next));
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < count; ++i) out[row * out_stride + i] *= factors[i];
}

std::size_t scratch_floats(int width) { return UNPACKED_ROWS * static_cast<std::size_t>(padded(width)) / 2; }

void matmul(const MatrixRows &weights, const Activations &activations, float *out, std::size_t out_stride,
            float *scratch) {
    const Matrix &matrix = weights.matrix;
    const int width = weights.width, rows = activations.rows;
    const float *x = activations.x;
    const std::size_t stride = activations.stride;
    if (matrix.rows == nullptr) {
        const Half *halves = reinterpret_cast<const Half *>(matrix.memory);
        const std::size_t offset = static_cast<std::size_t>(weights.begin) * width;
        return matmul(halves + offset, weights.outputs, width, x, stride, rows, out, out_stride);
    }
    for (int first = 0; first < weights.outputs;) {
        int run = float16_run(weights, first);
        if (run > 0) {
            const std::uint8_t *halves = packed_row(matrix, weights.begin + first).codes;
            matmul(reinterpret_cast<const Half *>(halves), run, width, x, stride, rows, out + first, out_stride);
        } else if (rows <= MAX_PACKED_ROWS) {
            run = PACKED_DOTS[rows - 1](weights, first, x, stride, out + first, out_stride);
        } else {
            run = packed_run(weights, first, UNPACKED_ROWS);
            unpack_and_multiply(weights, first, run, x, stride, rows, out + first, out_stride,
                                reinterpret_cast<Half *>(scratch));
        }
        first += run;
    }
}
