// Attention in AMX tiles. decode.cpp includes this file once, inside namespace amx.
//
// The products follow tile_matmul.hpp: each float16 or float32 number is a sum of two bfloat16 numbers, and the product of
// both lower parts is left out. Scores are computed for 16 keys at a time, and weighted sums of values for 32 positions.
// These blocks start at position 0, and a query's weights are zero behind its own position. Hence a query has the same bits
// alone and with others: adding zeros changes no sum.

constexpr int QUERY_ROWS = 16;      // queries that share the keys and values that are read
constexpr int KEY_ROWS = 16;        // keys of a tile
constexpr int VALUE_POSITIONS = 32; // positions of a tile of values
constexpr int VALUE_TILES = 4;      // tiles of 16 dimensions that are summed up together
constexpr std::size_t KV_PREFETCH_BYTES = 6144;

constexpr int dim_tiles(int dim) { return (dim + TILE_INPUTS - 1) / TILE_INPUTS; }
constexpr int value_tiles(int dim) { return (dim + GROUP_ROWS - 1) / GROUP_ROWS; }
constexpr int whole_positions(int positions) {
    return (positions + VALUE_POSITIONS - 1) / VALUE_POSITIONS * VALUE_POSITIONS;
}

// The memory of a thread for up to QUERY_ROWS queries and this number of positions.
struct AttentionScratch {
    float *queries, *scores, *sums, *tile;
    std::uint16_t *query_tiles, *key_tiles, *weight_tiles, *value_tiles;
    std::size_t score_stride;

    AttentionScratch(float *memory, int dim, int positions) : score_stride(whole_positions(positions) + LANES) {
        const auto take = [&](std::size_t floats) { return std::exchange(memory, memory + floats); };
        const auto take_tiles = [&](std::size_t tiles) {
            return reinterpret_cast<std::uint16_t *>(take(tiles * TILE_HALVES / 2));
        };
        queries = take(QUERY_ROWS * padded(dim));
        sums = take(QUERY_ROWS * amx::value_tiles(dim) * GROUP_ROWS);
        tile = take(KEY_ROWS * QUERY_ROWS);
        query_tiles = take_tiles(2 * dim_tiles(dim));
        key_tiles = take_tiles(2 * dim_tiles(dim));
        value_tiles = take_tiles(2 * VALUE_TILES);
        weight_tiles = take_tiles(2 * whole_positions(positions) / VALUE_POSITIONS);
        scores = take(QUERY_ROWS * score_stride);
    }
};

std::size_t attention_floats(int, int dim, int context) {
    const std::size_t tiles = 4 * dim_tiles(dim) + 2 * VALUE_TILES + 2 * whole_positions(context) / VALUE_POSITIONS;
    return tiles * TILE_HALVES / 2 + QUERY_ROWS * (padded(dim) + value_tiles(dim) * GROUP_ROWS + KEY_ROWS) +
           QUERY_ROWS * (whole_positions(context) + LANES);
}

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

// Writes up to 16 keys as the first operand.
void split_keys(const Half *keys, int count, int dim, std::uint16_t *tiles) {
    for (int key = 0; key < count; ++key, keys += dim)
        for (int tile = 0; tile < dim_tiles(dim); ++tile) {
            __builtin_prefetch(reinterpret_cast<const char *>(keys + tile * TILE_INPUTS) + KV_PREFETCH_BYTES, 0, 2);
            std::uint16_t *to = tiles + tile * 2 * TILE_HALVES + key * LINE_HALVES;
            const HighLow first(load_row(keys, tile * TILE_INPUTS, dim));
            const HighLow second(load_row(keys, tile * TILE_INPUTS + LANES, dim));
            _mm512_store_si512(to, join_upper(first.high, second.high));
            _mm512_store_si512(to + TILE_HALVES, join_upper(first.low, second.low));
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

// scores[row][key] = queries[row] . keys[key]
void score(const Half *keys, int count, int dim, int rows, const AttentionScratch &scratch) {
    const __m512i column = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(QUERY_ROWS));
    configure_attention(KEY_ROWS, rows, KEY_ROWS, rows);
    for (int first = 0; first < count; first += KEY_ROWS) {
        split_keys(keys + static_cast<std::size_t>(first) * dim, std::min(KEY_ROWS, count - first), dim, scratch.key_tiles);
        _tile_zero(0);
        for (int tile = 0; tile < dim_tiles(dim); ++tile) {
            const std::uint16_t *key = scratch.key_tiles + tile * 2 * TILE_HALVES;
            const std::uint16_t *query = scratch.query_tiles + tile * 2 * TILE_HALVES;
            _tile_loadd(4, key, LINE_BYTES);
            _tile_loadd(5, key + TILE_HALVES, LINE_BYTES);
            _tile_loadd(6, query, LINE_BYTES);
            _tile_loadd(7, query + TILE_HALVES, LINE_BYTES);
            _tile_dpbf16ps(0, 5, 6);
            _tile_dpbf16ps(0, 4, 7);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, scratch.tile, QUERY_ROWS * sizeof(float));
        // Scores of absent keys are replaced by zeros after the softmax.
        for (int row = 0; row < rows; ++row)
            _mm512_storeu_ps(scratch.scores + row * scratch.score_stride + first,
                             _mm512_i32gather_ps(column, scratch.tile + row, sizeof(float)));
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
inline void split_values(const Half *values, int count, int i, int dim, std::uint16_t *tiles) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const auto load = [&](int at) {
        const Half *row = values + static_cast<std::size_t>(at) * dim;
        return HighLow(at < count ? load_row(row, i, dim) : _mm512_setzero_ps());
    };
    // (even >> 16) | (odd & mask)
    const auto join = [&](__m512i even, __m512i odd) {
        return _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, mask, 0xf8);
    };
    for (int pair = 0; pair < TILE_LINES; ++pair) {
        if (i % LINE_HALVES == 0)  // the next 16 dimensions are in the same cache line
            for (int row = 2 * pair; row < 2 * pair + 2; ++row)
                __builtin_prefetch(reinterpret_cast<const char *>(values + row * dim + i) + KV_PREFETCH_BYTES, 0, 2);
        const HighLow even = load(2 * pair), odd = load(2 * pair + 1);
        _mm512_store_si512(tiles + pair * LINE_HALVES, join(even.high, odd.high));
        _mm512_store_si512(tiles + TILE_HALVES + pair * LINE_HALVES, join(even.low, odd.low));
    }
}

// A macro, because the intrinsics paste the number of the register into the instruction.
#define LLAMA2_ADD_WEIGHTED(sums, values)                    \
    _tile_loadd(6, values, LINE_BYTES);                      \
    _tile_loadd(7, (values) + TILE_HALVES, LINE_BYTES);      \
    _tile_dpbf16ps(sums, 4, 7);                              \
    _tile_dpbf16ps(sums, 5, 6);                              \
    _tile_dpbf16ps(sums, 4, 6)

// sums[row] = weights[row] . values, for up to VALUE_TILES tiles of 16 dimensions from tile `first` on.
void weighted_sums(const Half *values, int count, int dim, int first, const AttentionScratch &scratch) {
    const int tiles = std::min(VALUE_TILES, value_tiles(dim) - first);
    std::uint16_t *const parts = scratch.value_tiles;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int begin = 0; begin < count; begin += VALUE_POSITIONS) {
        for (int tile = 0; tile < tiles; ++tile)
            split_values(values + static_cast<std::size_t>(begin) * dim, std::min(VALUE_POSITIONS, count - begin),
                         (first + tile) * GROUP_ROWS, dim, parts + tile * 2 * TILE_HALVES);
        const std::uint16_t *weights = scratch.weight_tiles + begin / VALUE_POSITIONS * 2 * TILE_HALVES;
        _tile_loadd(4, weights, LINE_BYTES);
        _tile_loadd(5, weights + TILE_HALVES, LINE_BYTES);
        LLAMA2_ADD_WEIGHTED(0, parts);
        if (tiles > 1) {
            LLAMA2_ADD_WEIGHTED(1, parts + 2 * TILE_HALVES);
        }
        if (tiles > 2) {
            LLAMA2_ADD_WEIGHTED(2, parts + 4 * TILE_HALVES);
        }
        if (tiles > 3) {
            LLAMA2_ADD_WEIGHTED(3, parts + 6 * TILE_HALVES);
        }
    }
    const std::size_t stride = value_tiles(dim) * GROUP_ROWS * sizeof(float);
    float *const sums = scratch.sums + first * GROUP_ROWS;
    _tile_stored(0, sums, stride);
    if (tiles > 1) _tile_stored(1, sums + GROUP_ROWS, stride);
    if (tiles > 2) _tile_stored(2, sums + 2 * GROUP_ROWS, stride);
    if (tiles > 3) _tile_stored(3, sums + 3 * GROUP_ROWS, stride);
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
    score(a.keys, all_keys, dim, rows, scratch);
    const int positions = whole_positions(all_keys);
    for (int row = 0; row < rows; ++row) {
        float *scores = scratch.scores + row * scratch.score_stride;
        const int count = a.position + (first + row) / a.group + 1;
        avx512::softmax(scores, count);
        std::fill(scores + count, scores + positions, 0.0f);
    }
    split_weights(rows, positions, scratch);
    configure_attention(rows, GROUP_ROWS, rows, GROUP_ROWS);
    for (int tile = 0; tile < value_tiles(dim); tile += VALUE_TILES) weighted_sums(a.values, all_keys, dim, tile, scratch);
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
