// Matmul in AMX tiles, the same kernel for every number of rows. decode.cpp includes this file once, inside namespace amx.
//
// TDPBF16PS multiplies bfloat16 numbers and sums up in float32. An activation is nearly the sum of two bfloat16 numbers,
// its rounded value and the rounded rest, with a relative error of 2^-17. A weight is exactly the sum of two, or one if it
// has at most 8 significant bits. For each tile of 32 inputs, the products are added in this order: upper activations by
// lower weights (zero for codes, and left out), lower activations by upper weights, and both upper parts. The product of
// both lower parts is left out. The hardware sums up 16 pairs of even and 16 of odd inputs, adds the two sums, and adds
// the result to the output. No step of this depends on the other rows, so a row has the same bits in every step.
//
// TDPBF16PS reads numbers below 2^-126 as zero, and rounds to zero below them. Weights have no such numbers; for
// activations this changes a sum by less than 2^-100 times the largest weight.

constexpr int PREFILL_ROWS = 128;
constexpr int TILE_ROWS = 16, MAX_PASS_ROWS = 128;  // rows of activations per tile, and per pass over the weights
constexpr int FEW_GROUPS = 4;                         // groups that few rows are multiplied by together
constexpr int TILES_AHEAD = 3;                        // far enough to arrive in time, near enough to stay cached
constexpr int PANEL_OUTPUTS = 128, PANEL_TILES = 4;  // a panel of weights is unpacked for all rows of a pass
constexpr int PANEL_GROUPS = PANEL_OUTPUTS / GROUP_ROWS;

// What a thread needs for a product.
struct Scratch {
    alignas(64) std::uint16_t high[PANEL_GROUPS][PANEL_TILES][TILE_HALVES], low[PANEL_GROUPS][PANEL_TILES][TILE_HALVES];
    alignas(64) float sums[MAX_PASS_ROWS / TILE_ROWS][PANEL_GROUPS][TILE_ROWS * GROUP_ROWS];
};

std::size_t scratch_floats(int) { return sizeof(Scratch) / sizeof(float); }

// Rows of each tile of activations. A few rows are stored without gaps, so that they stay in the L1 cache.
constexpr int rows_per_tile(int rows) { return std::min(rows, TILE_ROWS); }

constexpr std::size_t tile_numbers(int rows, int width) {
    return static_cast<std::size_t>((rows + TILE_ROWS - 1) / TILE_ROWS) * TILE_ROWS * tiles_of(width) * TILE_INPUTS * 2;
}

// The bfloat16 nearest to each of 16 floats, in the upper halves of the lanes, ties to even.
inline __m512i nearest_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, last), _mm512_set1_epi32(0x7fff));
    // Infinity and NaN stay what they are, so that a step with them has no finite logits.
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    return _mm512_and_si512(_mm512_mask_mov_epi32(bits, finite, rounded), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

inline void store_upper(std::uint16_t *to, __m512i lanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(lanes, 16)));
}

// Tiles are stored as [rows / 16][width / 32][upper, lower][row][32].
void split(const float *x, std::size_t stride, int rows, int width, std::uint16_t *tiles) {
    const int count = tiles_of(width), size = rows_per_tile(rows) * TILE_INPUTS;
    for (int row = 0; row < (rows + TILE_ROWS - 1) / TILE_ROWS * rows_per_tile(rows); ++row) {
        std::uint16_t *to = tiles + static_cast<std::size_t>(row / TILE_ROWS) * count * 2 * size + row % TILE_ROWS * TILE_INPUTS;
        for (int tile = 0; tile < count; ++tile, to += 2 * size)
            for (int i = 0; i < TILE_INPUTS; i += LANES) {
                const int at = tile * TILE_INPUTS + i;
                const __m512 numbers = row < rows && at < width ? avx512::load(x + row * stride + at) : _mm512_setzero_ps();
                const __m512i upper = nearest_bfloat16(numbers);
                store_upper(to + i, upper);
                store_upper(to + size + i, nearest_bfloat16(_mm512_sub_ps(numbers, _mm512_castsi512_ps(upper))));
            }
    }
}

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// The registers before `first_weights` have tiles of `rows` rows of sums or activations; the others have 16 lines.
inline void configure(int rows, int first_weights) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = LINE_BYTES;
        config.rows[i] = static_cast<std::uint8_t>(i < first_weights ? rows : TILE_LINES);
    }
    _tile_loadconfig(&config);
}

// A range of outputs of a matrix, as groups of which the first and the last may be used in part.
struct Outputs {
    const MatrixRows &weights;
    float *out;
    std::size_t stride;

    int first_group() const { return weights.begin / GROUP_ROWS; }
    int groups() const { return groups_of(weights.begin + weights.outputs) - first_group(); }
    bool whole(int group) const {
        const int begin = (first_group() + group) * GROUP_ROWS;
        return begin >= weights.begin && begin + GROUP_ROWS <= weights.begin + weights.outputs;
    }
    float *column(int group) const { return out + (first_group() + group) * GROUP_ROWS - weights.begin; }

    // Copies the sums of a group, (rows, 16), for the outputs that are in the range.
    void write(int group, int first_row, int rows, const float *sums) const {
        const int begin = (first_group() + group) * GROUP_ROWS;
        const int from = std::max(weights.begin - begin, 0);
        const int to = std::min(weights.begin + weights.outputs - begin, GROUP_ROWS);
        for (int row = 0; row < rows; ++row)
            std::memcpy(column(group) + (first_row + row) * stride + from, sums + row * GROUP_ROWS + from,
                        (to - from) * sizeof(float));
    }
};

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// The products of two tiles of activations, registers 4 and 5, and two of weights, 6 and 7.
inline void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// The tile that a thread requests while it unpacks tile `index`, or if the group ends before, one of the group that
// follows after FEW_GROUPS groups.
inline const std::uint8_t *tile_ahead(const Group &group, int index, int width) {
    const int next = index + TILES_AHEAD, count = tiles_of(width);
    return next < count ? group.tile(next) : group.tile(next - count) + FEW_GROUPS * group_bytes(group.format, width);
}

// Adds the products of up to 16 rows and one group to the sums. Registers 4 and 5 have the upper and lower parts of the
// rows. A macro, because the intrinsics paste the number of the register into the instruction.
#define LLAMA2_ADD_GROUP(sums, weights)                            \
    if (!CODES) {                                                  \
        _tile_loadd(weights, scratch.low[sums][slot], LINE_BYTES); \
        _tile_dpbf16ps(sums, 4, weights);                          \
    }                                                              \
    _tile_loadd(weights, scratch.high[sums][slot], LINE_BYTES);    \
    _tile_dpbf16ps(sums, 5, weights);                              \
    _tile_dpbf16ps(sums, 4, weights)

// Up to 16 rows times FEW_GROUPS groups. The weights of the next tile are unpacked while this one is multiplied, group by
// group, because a processor looks only a few hundred instructions ahead.
template <bool CODES>
void multiply_few_rows(const Group (&groups)[FEW_GROUPS], int width, const std::uint16_t *x, int rows, Scratch &scratch) {
    const int count = tiles_of(width), size = rows * TILE_INPUTS;
    const auto prepare = [&](int tile, int i) __attribute__((always_inline)) {
        if (tile == count) return;
        const std::uint8_t *next = tile_ahead(groups[i], tile, width);
        std::uint16_t *high = scratch.high[i][tile % 2], *low = scratch.low[i][tile % 2];
        CODES ? unpack_tile<true>(groups[i], tile, high, next) : unpack_parts<true>(groups[i], tile, high, low, next);
    };
    for (int i = 0; i < FEW_GROUPS; ++i) {
        if (!CODES) std::memset(scratch.low[i], 0, 2 * sizeof scratch.low[i][0]);
        __builtin_prefetch(groups[i].flags + FEW_GROUPS * group_bytes(groups[i].format, width), 0, 2);
    }
    zero_sums();
    for (int i = 0; i < FEW_GROUPS; ++i) prepare(0, i);
    for (int tile = 0; tile < count; ++tile, x += 2 * size) {
        const int slot = tile % 2;
        _tile_loadd(4, x, LINE_BYTES);
        _tile_loadd(5, x + size, LINE_BYTES);
        prepare(tile + 1, 0);
        LLAMA2_ADD_GROUP(0, 6);
        prepare(tile + 1, 1);
        LLAMA2_ADD_GROUP(1, 7);
        prepare(tile + 1, 2);
        LLAMA2_ADD_GROUP(2, 6);
        prepare(tile + 1, 3);
        LLAMA2_ADD_GROUP(3, 7);
    }
}

inline void store_tile(int tile, float *to, std::size_t stride) {
    if (tile == 0) _tile_stored(0, to, stride);
    else if (tile == 1) _tile_stored(1, to, stride);
    else if (tile == 2) _tile_stored(2, to, stride);
    else _tile_stored(3, to, stride);
}

void few_rows(const Outputs &outputs, int width, const std::uint16_t *x, int rows, Scratch &scratch) {
    configure(rows, 6);
    for (int first = 0; first < outputs.groups(); first += FEW_GROUPS) {
        Group groups[FEW_GROUPS];
        bool codes = true;
        for (int i = 0; i < FEW_GROUPS; ++i) {  // the last group stands for those that are missing
            const int group = std::min(first + i, outputs.groups() - 1);
            groups[i] = group_of(outputs.weights.matrix, outputs.first_group() + group, width);
            codes &= groups[i].format != FLOAT16;
        }
        (codes ? multiply_few_rows<true> : multiply_few_rows<false>)(groups, width, x, rows, scratch);
        for (int i = 0; i < std::min(FEW_GROUPS, outputs.groups() - first); ++i) {
            float *sums = scratch.sums[0][i];
            const bool whole = outputs.whole(first + i);
            store_tile(i, whole ? outputs.column(first + i) : sums, (whole ? outputs.stride : GROUP_ROWS) * sizeof(float));
            if (!whole) outputs.write(first + i, 0, rows, sums);
        }
    }
}

// One group of a panel: unpacked tiles of weights, and the memory of the next panel.
struct PanelGroup {
    const std::uint16_t (*high)[TILE_HALVES], (*low)[TILE_HALVES];
    const std::uint8_t *next;
};

// Two tiles of rows times two groups of a panel: adds the products of `count` tiles to four tiles of sums. For each
// tile, it requests `lines` cache lines of each group's next panel, so that memory and arithmetic are busy together.
template <bool CODES>
void multiply_panel(const std::uint16_t *x, const std::uint16_t *y, PanelGroup a, PanelGroup b, int count, int lines) {
    for (int tile = 0; tile < count; ++tile, x += 2 * TILE_HALVES, y += 2 * TILE_HALVES) {
        for (int line = 0; line < lines; ++line, a.next += LINE_BYTES, b.next += LINE_BYTES) {
            __builtin_prefetch(a.next, 0, 2);
            __builtin_prefetch(b.next, 0, 2);
        }
        if (!CODES) {
            _tile_loadd(4, x, LINE_BYTES);
            _tile_loadd(5, y, LINE_BYTES);
            _tile_loadd(6, a.low[tile], LINE_BYTES);
            _tile_loadd(7, b.low[tile], LINE_BYTES);
            multiply_tiles();
        }
        _tile_loadd(4, x + TILE_HALVES, LINE_BYTES);
        _tile_loadd(5, y + TILE_HALVES, LINE_BYTES);
        _tile_loadd(6, a.high[tile], LINE_BYTES);
        _tile_loadd(7, b.high[tile], LINE_BYTES);
        multiply_tiles();
        _tile_loadd(4, x, LINE_BYTES);
        _tile_loadd(5, y, LINE_BYTES);
        multiply_tiles();
    }
}

// Four tiles of sums, registers 0 to 3: zeros, or those in memory.
inline void load_sums(float *const (&sums)[4], bool zeros) {
    if (zeros) {
        zero_sums();
    } else {
        _tile_loadd(0, sums[0], LINE_BYTES);
        _tile_loadd(1, sums[1], LINE_BYTES);
        _tile_loadd(2, sums[2], LINE_BYTES);
        _tile_loadd(3, sums[3], LINE_BYTES);
    }
}

inline void store_sums(float *const (&sums)[4]) {
    _tile_stored(0, sums[0], LINE_BYTES);
    _tile_stored(1, sums[1], LINE_BYTES);
    _tile_stored(2, sums[2], LINE_BYTES);
    _tile_stored(3, sums[3], LINE_BYTES);
}

// More than 16 rows, at most MAX_PASS_ROWS, times up to PANEL_GROUPS groups, one panel of inputs after another.
class ManyRows {
  public:
    ManyRows(const Outputs &outputs, int first, int count, const std::uint16_t *x, int rows, Scratch &scratch)
        : count_(count),
          tiles_(tiles_of(outputs.weights.width)),
          row_tiles_((rows + TILE_ROWS - 1) / TILE_ROWS),
          x_(x),
          scratch_(scratch) {
        for (int i = 0; i < count; ++i) {
            groups_[i] = group_of(outputs.weights.matrix, outputs.first_group() + first + i, outputs.weights.width);
            if (groups_[i].format != FLOAT16) std::memset(scratch.low[i], 0, sizeof scratch.low[i]);
        }
        for (int begin = 0; begin < tiles_; begin += PANEL_TILES) multiply(begin, std::min(PANEL_TILES, tiles_ - begin));
        for (int tile = 0; tile < row_tiles_; ++tile)
            for (int i = 0; i < count; ++i)
                outputs.write(first + i, tile * TILE_ROWS, std::min(TILE_ROWS, rows - tile * TILE_ROWS),
                              scratch.sums[tile][i]);
    }

  private:
    void multiply(int begin, int tiles) {
        for (int i = 0; i < count_; ++i)
            for (int tile = 0; tile < tiles; ++tile)
                unpack_parts<false>(groups_[i], begin + tile, scratch_.high[i][tile], scratch_.low[i][tile]);
        const int passes = (row_tiles_ + 1) / 2;
        const int lines = (CODE_TILE_BYTES / LINE_BYTES + passes - 1) / passes;
        for (int pass = 0; pass < passes; ++pass) {
            // An odd last tile of rows is computed twice, and so is an odd last group.
            const int row = 2 * pass, other_row = std::min(row + 1, row_tiles_ - 1);
            for (int i = 0; i < count_; i += 2) {
                const int j = std::min(i + 1, count_ - 1);
                float *const sums[4] = {scratch_.sums[row][i], scratch_.sums[row][j], scratch_.sums[other_row][i],
                                        scratch_.sums[other_row][j]};
                load_sums(sums, begin == 0);
                const bool codes = groups_[i].format != FLOAT16 && groups_[j].format != FLOAT16;
                (codes ? multiply_panel<true> : multiply_panel<false>)(
                    activations(row, begin), activations(other_row, begin), panel_group(i, begin, pass * lines),
                    panel_group(j, begin, pass * lines), tiles, lines);
                store_sums(sums);
            }
        }
    }

    const std::uint16_t *activations(int row_tile, int begin) const {
        return x_ + (static_cast<std::size_t>(row_tile) * tiles_ + begin) * 2 * TILE_HALVES;
    }

    // `line` is the first line to request, per tile; a request behind the last tile does nothing.
    PanelGroup panel_group(int group, int begin, int line) const {
        const std::uint8_t *next = groups_[group].tile(begin + PANEL_TILES) + PANEL_TILES * line * LINE_BYTES;
        return {scratch_.high[group], scratch_.low[group], next};
    }

    Group groups_[PANEL_GROUPS];
    const int count_, tiles_, row_tiles_;
    const std::uint16_t *const x_;
    Scratch &scratch_;
};

void matmul(const MatrixRows &weights, const Activations &activations, float *out, std::size_t out_stride,
            float *memory) {
    Scratch &scratch = *reinterpret_cast<Scratch *>(memory);
    const int width = weights.width, rows = activations.rows;
    if (rows <= TILE_ROWS) {
        few_rows({weights, out, out_stride}, width, activations.tiles, rows, scratch);
    } else {
        configure(TILE_ROWS, 0);
        for (int row = 0; row < rows; row += MAX_PASS_ROWS) {
            const Outputs outputs{weights, out + row * out_stride, out_stride};
            const std::uint16_t *x = activations.tiles + static_cast<std::size_t>(row) * tiles_of(width) * TILE_INPUTS * 2;
            for (int first = 0; first < outputs.groups(); first += PANEL_GROUPS)
                ManyRows(outputs, first, std::min(PANEL_GROUPS, outputs.groups() - first), x,
                         std::min(MAX_PASS_ROWS, rows - row), scratch);
        }
    }
    _tile_release();  // a thread with tiles in use has a larger state to switch
}
