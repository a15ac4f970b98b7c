// Attention in AMX tiles. decode.cpp includes this file once, inside namespace amx.
//
// The products follow tile_matmul.hpp: each float16 or float32 number is a sum of two bfloat16 numbers, and the product of
// both lower parts is left out. Scores are computed for 16 keys at a time, and weighted sums of values for 32 positions.
// These blocks start at position 0, and a query's weights are zero behind its own position. Hence a query has the same bits
// alone and with others: adding zeros changes no sum.
//
// Splitting keys and values takes longer than their products. While one tile is multiplied, the next one is split: the
// instructions of both alternate, tile by tile, because a processor looks only a few hundred instructions ahead.

constexpr int QUERY_ROWS = 16;      // queries that share the keys and values that are read
constexpr int KEY_ROWS = 16;        // keys of a tile
constexpr int VALUE_POSITIONS = 32; // positions of a tile of values
constexpr int KEY_TILES = 4;        // tiles of keys that are multiplied together
constexpr int VALUE_TILES = 4;      // tiles of 16 dimensions that are summed up together
constexpr std::size_t KV_PREFETCH_BYTES = 16384;

constexpr int dim_tiles(int dim) { return (dim + TILE_INPUTS - 1) / TILE_INPUTS; }
constexpr int value_tiles(int dim) { return (dim + GROUP_ROWS - 1) / GROUP_ROWS; }
constexpr int whole_positions(int positions) {
    return (positions + VALUE_POSITIONS - 1) / VALUE_POSITIONS * VALUE_POSITIONS;
}

// The memory of a thread for up to QUERY_ROWS queries and this number of positions.
struct AttentionScratch {
    float *queries, *scores, *sums, *sums_of_keys;
    std::uint16_t *query_tiles, *weight_tiles;
    std::uint16_t *parts[2];  // tiles of keys or values: one buffer is filled while the other is multiplied
    std::size_t score_stride;

    AttentionScratch(float *memory, int dim, int positions) : score_stride(whole_positions(positions) + LANES) {
        const auto take = [&](std::size_t floats) { return std::exchange(memory, memory + floats); };
        const auto take_tiles = [&](std::size_t tiles) {
            return reinterpret_cast<std::uint16_t *>(take(tiles * TILE_HALVES / 2));
        };
        queries = take(QUERY_ROWS * padded(dim));
        sums = take(QUERY_ROWS * amx::value_tiles(dim) * GROUP_ROWS);
        sums_of_keys = take(KEY_TILES * KEY_ROWS * QUERY_ROWS);
        query_tiles = take_tiles(2 * dim_tiles(dim));
        for (std::uint16_t *&buffer : parts) buffer = take_tiles(2 * std::max(KEY_TILES, VALUE_TILES));
        weight_tiles = take_tiles(2 * whole_positions(positions) / VALUE_POSITIONS);
        scores = take(QUERY_ROWS * score_stride);
    }
};

std::size_t attention_floats(int, int dim, int context) {
    const std::size_t parts = 2 * 2 * std::max(KEY_TILES, VALUE_TILES);
    const std::size_t tiles = 2 * dim_tiles(dim) + parts + 2 * whole_positions(context) / VALUE_POSITIONS;
    return tiles * TILE_HALVES / 2 + QUERY_ROWS * (padded(dim) + value_tiles(dim) * GROUP_ROWS + KEY_TILES * KEY_ROWS) +
           QUERY_ROWS * (whole_positions(context) + LANES);
}

// Keys or values of a head, which are read in order, and what is read after them.
struct CachedRows {
    const Half *rows;
    int count, dim;
    const Half *next;

    // What is read KV_PREFETCH_BYTES after dimension `i` of a row. A request for memory that does not exist does nothing.
    const Half *ahead(int row, int i) const {
        const std::size_t end = static_cast<std::size_t>(count) * dim;
        const std::size_t number = static_cast<std::size_t>(row) * dim + i + KV_PREFETCH_BYTES / sizeof(Half);
        return number < end ? rows + number : next + (number - end);
    }
};

// 16 numbers from `i` on of a row of `dim`, with zeros behind them.
inline __m512 load_row(const Half *row, int i, int dim) {
    if (i + LANES <= dim) return avx512::load(row + i);
    return i < dim ? avx512::load_partial(row + i, dim - i) : _mm512_setzero_ps();
}

// Writes queries as the second operand: for each tile of 32 dimensions, upper and lower parts of 16 pairs of dimensions.
void split_queries(const float *queries, std::size_t stride, int rows, int dim, std::uint16_t *tiles) {
    alignas(64) std::uint16_t upper[TILE_INPUTS], lower[TILE_INPUTS];
    for (int row = 0; row < rows; ++row)
        for (int tile = 0; tile < dim_tiles(dim); ++tile) {
            for (int i = 0; i < TILE_INPUTS; i += LANES) {
                const int at = tile * TILE_INPUTS + i;
                const __m512 numbers = at < dim ? avx512::load(queries + row * stride + at) : _mm512_setzero_ps();
                const __m512i nearest = nearest_bfloat16(numbers);
                store_upper(upper + i, nearest);
                store_upper(lower + i, nearest_bfloat16(_mm512_sub_ps(numbers, _mm512_castsi512_ps(nearest))));
            }
            std::uint16_t *to = tiles + tile * 2 * TILE_HALVES + 2 * row;
            for (int pair = 0; pair < TILE_LINES; ++pair) {
                std::memcpy(to + pair * LINE_HALVES, upper + 2 * pair, 2 * sizeof *to);
                std::memcpy(to + TILE_HALVES + pair * LINE_HALVES, lower + 2 * pair, 2 * sizeof *to);
            }
        }
}

// Writes 32 dimensions, from `i` on, of up to 16 keys as the first operand.
inline void split_keys(const CachedRows &keys, int begin, int i, std::uint16_t *tiles) {
    const int dim = keys.dim, count = std::min(KEY_ROWS, keys.count - begin);
    const Half *row = keys.rows + static_cast<std::size_t>(begin) * dim, *ahead = keys.ahead(begin, i);
    const auto write = [&](int key, __m512 first_half, __m512 second_half) __attribute__((always_inline)) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += dim;
        const HighLow first(first_half), second(second_half);
        _mm512_store_si512(tiles + key * LINE_HALVES, join_upper(first.high, second.high));
        _mm512_store_si512(tiles + key * LINE_HALVES + TILE_HALVES, join_upper(first.low, second.low));
    };
    if (count == KEY_ROWS && i + TILE_INPUTS <= dim) {
#pragma GCC unroll 4
        for (int key = 0; key < KEY_ROWS; ++key, row += dim)
            write(key, avx512::load(row + i), avx512::load(row + i + LANES));
    } else {
        for (int key = 0; key < count; ++key, row += dim) write(key, load_row(row, i, dim), load_row(row, i + LANES, dim));
    }
}

// The registers: 0 to 3 have sums, 4 and 5 the upper and lower part of the first operand, 6 and 7 of the second.
inline void configure_attention(int sum_rows, int sum_columns, int first_rows, int second_columns) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        const int columns = i < 4 ? sum_columns : i < 6 ? GROUP_ROWS : second_columns;
        config.rows[i] = static_cast<std::uint8_t>(i < 4 ? sum_rows : i < 6 ? first_rows : TILE_LINES);
        config.row_bytes[i] = static_cast<std::uint16_t>(columns * sizeof(float));
    }
    _tile_loadconfig(&config);
}

// Macros, because the intrinsics paste the number of the register into the instruction.
#define LLAMA2_ADD_SCORES(sums, keys)                 \
    _tile_loadd(5, (keys) + TILE_HALVES, LINE_BYTES); \
    _tile_loadd(4, keys, LINE_BYTES);                 \
    _tile_dpbf16ps(sums, 5, 6);                       \
    _tile_dpbf16ps(sums, 4, 7);                       \
    _tile_dpbf16ps(sums, 4, 6)

#define LLAMA2_ADD_WEIGHTED(sums, values)               \
    _tile_loadd(6, values, LINE_BYTES);                 \
    _tile_loadd(7, (values) + TILE_HALVES, LINE_BYTES); \
    _tile_dpbf16ps(sums, 4, 7);                         \
    _tile_dpbf16ps(sums, 5, 6);                         \
    _tile_dpbf16ps(sums, 4, 6)

// Writes the sums of `count` tiles, which start `size` floats apart.
inline void store_tiles(int count, float *to, std::size_t size, std::size_t stride) {
    for (int i = 0; i < count; ++i) store_tile(i, to + i * size, stride * sizeof(float));
}

// Writes the sums of `count` tiles of keys, (key, row), as scores (row, key) from `first` on. Scores of absent keys are
// replaced by zeros after the softmax.
inline void store_scores(int count, int rows, int first, const AttentionScratch &scratch) {
    float *const scores = scratch.scores + first;
    if (rows == 1) return store_tiles(count, scores, KEY_ROWS, 1);
    const __m512i column = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(QUERY_ROWS));
    constexpr int SIZE = KEY_ROWS * QUERY_ROWS;
    store_tiles(count, scratch.sums_of_keys, SIZE, QUERY_ROWS);
    for (int i = 0; i < count; ++i)
        for (int row = 0; row < rows; ++row)
            _mm512_storeu_ps(scores + row * scratch.score_stride + i * KEY_ROWS,
                             _mm512_i32gather_ps(column, scratch.sums_of_keys + i * SIZE + row, sizeof(float)));
}

// scores[row][key] = queries[row] . keys[key]. A step multiplies up to KEY_TILES tiles of keys by one tile of dimensions.
void score(const CachedRows &keys, int rows, const AttentionScratch &scratch) {
    const int dims = dim_tiles(keys.dim), tiles = (keys.count + KEY_ROWS - 1) / KEY_ROWS;
    const int steps = (tiles + KEY_TILES - 1) / KEY_TILES * dims;
    const auto prepare = [&](int step, int i) {  // absent keys are not written
        split_keys(keys, (step / dims * KEY_TILES + i) * KEY_ROWS, step % dims * TILE_INPUTS,
                   scratch.parts[step % 2] + i * 2 * TILE_HALVES);
    };
    configure_attention(KEY_ROWS, rows, KEY_ROWS, rows);
    for (int i = 0; i < KEY_TILES; ++i) prepare(0, i);
    for (int step = 0; step < steps; ++step) {
        const int first = step / dims * KEY_TILES, count = std::min(KEY_TILES, tiles - first);
        const std::uint16_t *query = scratch.query_tiles + step % dims * 2 * TILE_HALVES, *key = scratch.parts[step % 2];
        if (step % dims == 0) zero_sums();
        _tile_loadd(6, query, LINE_BYTES);
        _tile_loadd(7, query + TILE_HALVES, LINE_BYTES);
        prepare(step + 1, 0);
        LLAMA2_ADD_SCORES(0, key);
        if (count > 1) {
            prepare(step + 1, 1);
            LLAMA2_ADD_SCORES(1, key + 2 * TILE_HALVES);
        }
        if (count > 2) {
            prepare(step + 1, 2);
            LLAMA2_ADD_SCORES(2, key + 4 * TILE_HALVES);
        }
        if (count > 3) {
            prepare(step + 1, 3);
            LLAMA2_ADD_SCORES(3, key + 6 * TILE_HALVES);
        }
        if (step % dims == dims - 1) store_scores(count, rows, first * KEY_ROWS, scratch);
    }
}

// Writes the weights as the first operand: for each tile of 32 positions, upper and lower parts of the rows.
void split_weights(int rows, int positions, const AttentionScratch &scratch) {
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < positions; i += LANES) {
            const __m512 weights = _mm512_loadu_ps(scratch.scores + row * scratch.score_stride + i);
            const __m512i upper = nearest_bfloat16(weights);
            std::uint16_t *to = scratch.weight_tiles + i / VALUE_POSITIONS * 2 * TILE_HALVES + row * LINE_HALVES + i % VALUE_POSITIONS;
            store_upper(to, upper);
            store_upper(to + TILE_HALVES, nearest_bfloat16(_mm512_sub_ps(weights, _mm512_castsi512_ps(upper))));
        }
}

// Writes 16 dimensions, from `i` on, of up to 32 values as the second operand; absent values are zero.
inline void split_values(const CachedRows &values, int first, int i, std::uint16_t *tiles) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const int dim = values.dim, count = std::min(VALUE_POSITIONS, values.count - first);
    const Half *from = values.rows + static_cast<std::size_t>(first) * dim + i, *ahead = values.ahead(first, i);
    // (even >> 16) | (odd & mask)
    const auto join = [&](__m512i even, __m512i odd) __attribute__((always_inline)) {
        return _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, mask, 0xf8);
    };
    const auto write = [&](int at, __m512 even_row, __m512 odd_row) __attribute__((always_inline)) {
        const HighLow even(even_row), odd(odd_row);
        _mm512_store_si512(tiles + at / 2 * LINE_HALVES, join(even.high, odd.high));
        _mm512_store_si512(tiles + at / 2 * LINE_HALVES + TILE_HALVES, join(even.low, odd.low));
    };
    if (count == VALUE_POSITIONS && i + LANES <= dim) {
        // Two tiles of dimensions share each cache line: one requests those of odd rows, the other those of even rows.
        ahead += i % LINE_HALVES == 0 ? dim : 0;
#pragma GCC unroll 4
        for (int at = 0; at < VALUE_POSITIONS; at += 2, from += 2 * dim, ahead += 2 * dim) {
            __builtin_prefetch(ahead, 0, 2);
            write(at, avx512::load(from), avx512::load(from + dim));
        }
        return;
    }
    const auto columns = static_cast<__mmask16>((1u << std::min(LANES, dim - i)) - 1);
    const auto row = [&](int at) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(at < count ? columns : 0, from + at * dim));
    };
    for (int at = 0; at < VALUE_POSITIONS; at += 2) write(at, row(at), row(at + 1));
}

// sums[row] = weights[row] . values, for up to VALUE_TILES tiles of 16 dimensions from tile `first` on. A step adds 32
// positions. Absent tiles are computed too, but not stored.
void weighted_sums(const CachedRows &values, int first, const AttentionScratch &scratch) {
    const int tiles = std::min(VALUE_TILES, value_tiles(values.dim) - first);
    const int steps = whole_positions(values.count) / VALUE_POSITIONS;
    const auto prepare = [&](int step, int tile) {
        if (step < steps && tile < tiles)
            split_values(values, step * VALUE_POSITIONS, (first + tile) * GROUP_ROWS,
                         scratch.parts[step % 2] + tile * 2 * TILE_HALVES);
    };
    zero_sums();
    for (int tile = 0; tile < tiles; ++tile) prepare(0, tile);
    for (int step = 0; step < steps; ++step) {
        const std::uint16_t *weights = scratch.weight_tiles + step * 2 * TILE_HALVES, *parts = scratch.parts[step % 2];
        _tile_loadd(4, weights, LINE_BYTES);
        _tile_loadd(5, weights + TILE_HALVES, LINE_BYTES);
        prepare(step + 1, 0);
        LLAMA2_ADD_WEIGHTED(0, parts);
        prepare(step + 1, 1);
        LLAMA2_ADD_WEIGHTED(1, parts + 2 * TILE_HALVES);
        prepare(step + 1, 2);
        LLAMA2_ADD_WEIGHTED(2, parts + 4 * TILE_HALVES);
        prepare(step + 1, 3);
        LLAMA2_ADD_WEIGHTED(3, parts + 6 * TILE_HALVES);
    }
    store_tiles(tiles, scratch.sums + first * GROUP_ROWS, GROUP_ROWS, value_tiles(values.dim) * GROUP_ROWS);
}

// The attention of up to QUERY_ROWS queries from query `first` on.
void attend_rows(const Attention &a, int first, int rows) {
    const int dim = a.head_dim, stride = padded(dim), all_keys = a.position + a.tokens;
    const AttentionScratch scratch(a.scratch, dim, all_keys);
    const float scale = 1 / std::sqrt(static_cast<float>(dim));
    for (int row = 0; row < rows; ++row) {
        const int token = (first + row) / a.group, head = (first + row) % a.group;
        float *query = scratch.queries + row * stride;
        avx512::rotate(a.queries + token * a.stride + head * dim, a.cosines + token * dim, a.sines + token * dim, dim, scale,
                       query);
        std::fill(query + dim, query + stride, 0.0f);
    }
    split_queries(scratch.queries, stride, rows, dim, scratch.query_tiles);
    const CachedRows keys{a.keys, all_keys, dim, a.values}, values{a.values, all_keys, dim, a.next_keys};
    score(keys, rows, scratch);
    const int positions = whole_positions(all_keys);
    for (int row = 0; row < rows; ++row) {
        float *scores = scratch.scores + row * scratch.score_stride;
        const int count = a.position + (first + row) / a.group + 1;
        avx512::softmax(scores, count);
        std::fill(scores + count, scores + positions, 0.0f);
    }
    split_weights(rows, positions, scratch);
    configure_attention(rows, GROUP_ROWS, rows, GROUP_ROWS);
    for (int tile = 0; tile < value_tiles(dim); tile += VALUE_TILES) weighted_sums(values, tile, scratch);
    for (int row = 0; row < rows; ++row) {
        const int token = (first + row) / a.group, head = (first + row) % a.group;
        std::memcpy(a.out + token * a.out_stride + head * dim, scratch.sums + row * value_tiles(dim) * GROUP_ROWS,
                    dim * sizeof(float));
    }
}

void attend(const Attention &a) {
    for (int first = 0; first < a.tokens * a.group; first += QUERY_ROWS)
        attend_rows(a, first, std::min(QUERY_ROWS, a.tokens * a.group - first));
    _tile_release();
}
