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
constexpr int PANEL_GROUPS = 2, PANEL_TILES = 64;     // a panel of weights is unpacked for all rows of a pass

// What a thread needs for a product of few rows, and of many rows.
struct FewRowsScratch {
    alignas(64) std::uint16_t high[FEW_GROUPS][2][TILE_HALVES], low[FEW_GROUPS][2][TILE_HALVES];
    alignas(64) float sums[FEW_GROUPS][TILE_ROWS * GROUP_ROWS];
};
struct ManyRowsScratch {
    alignas(64) std::uint16_t high[PANEL_GROUPS][PANEL_TILES][TILE_HALVES], low[PANEL_GROUPS][PANEL_TILES][TILE_HALVES];
    alignas(64) float last_rows[PANEL_GROUPS][TILE_ROWS * GROUP_ROWS];  // the sums of fewer than 16 rows
    alignas(64) float sums[2][MAX_PASS_ROWS * GROUP_ROWS];  // of the first and the last group, if they are used in part
};

std::size_t scratch_floats(int) { return std::max(sizeof(FewRowsScratch), sizeof(ManyRowsScratch)) / sizeof(float); }

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
void split(const Activations &x, int begin, int count, int width, std::uint16_t *tiles) {
    const int rows = rows_per_tile(x.rows), size = rows * TILE_INPUTS;
    tiles += static_cast<std::size_t>(begin / TILE_ROWS) * tiles_of(width) * 2 * size;
    for (int row = 0; row < rows; ++row, tiles += TILE_INPUTS) {
        const float *from = x.x + (begin + row) * x.stride;
        std::uint16_t *to = tiles;
        for (int tile = 0; tile < tiles_of(width); ++tile, to += 2 * size)
            for (int i = 0; i < TILE_INPUTS; i += LANES) {
                const int at = tile * TILE_INPUTS + i;
                const __m512 numbers = row < count && at < width ? avx512::load(from + at) : _mm512_setzero_ps();
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

// Registers 0 to 3 have sums and 4 and 5 activations, in tiles of `rows` rows; 6 and 7 have weights.
inline void configure(int rows) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = LINE_BYTES;
        config.rows[i] = static_cast<std::uint8_t>(i < 6 ? rows : TILE_LINES);
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
void multiply_few_rows(const Group (&groups)[FEW_GROUPS], int width, const std::uint16_t *x, int rows, FewRowsScratch &scratch) {
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

inline void load_tile(int tile, const float *from, std::size_t stride) {
    if (tile == 0) _tile_loadd(0, from, stride);
    else if (tile == 1) _tile_loadd(1, from, stride);
    else if (tile == 2) _tile_loadd(2, from, stride);
    else _tile_loadd(3, from, stride);
}

inline void store_tile(int tile, float *to, std::size_t stride) {
    if (tile == 0) _tile_stored(0, to, stride);
    else if (tile == 1) _tile_stored(1, to, stride);
    else if (tile == 2) _tile_stored(2, to, stride);
    else _tile_stored(3, to, stride);
}

void few_rows(const Outputs &outputs, int width, const std::uint16_t *x, int rows, FewRowsScratch &scratch) {
    configure(rows);
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
            float *sums = scratch.sums[i];
            const bool whole = outputs.whole(first + i);
            store_tile(i, whole ? outputs.column(first + i) : sums, (whole ? outputs.stride : GROUP_ROWS) * sizeof(float));
            if (!whole) outputs.write(first + i, 0, rows, sums);
        }
    }
}

// More than 16 rows, at most MAX_PASS_ROWS, times a range of outputs: one panel of inputs after another, and within it two
// groups after another. The sums of a panel are added to those of the panel before it, which are in the output.
class ManyRows {
  public:
    ManyRows(const Outputs &outputs, const std::uint16_t *x, int rows, ManyRowsScratch &scratch)
        : outputs_(outputs),
          x_(x),
          rows_(rows),
          passes_((rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS)),
          all_tiles_(tiles_of(outputs.weights.width)),
          scratch_(scratch) {}

    void run() {
        configure(TILE_ROWS);
        for (begin_ = 0; begin_ < all_tiles_; begin_ += PANEL_TILES) {
            tiles_ = std::min(PANEL_TILES, all_tiles_ - begin_);
            for (int group = 0; group < outputs_.groups(); group += PANEL_GROUPS) multiply(group);
        }
        for (int group : {0, outputs_.groups() - 1})
            if (!outputs_.whole(group)) outputs_.write(group, 0, rows_, scratch_.sums[group > 0]);
    }

  private:
    // A group of the panel, where its sums are, and the weights of the panel that follows.
    struct Part {
        Group group;
        float *sums;
        std::size_t stride;
        const std::uint8_t *next;

        float *sums_of(int row) const { return sums + row * stride; }
    };

    Part part_of(int index) const {
        const int last = outputs_.groups() - 1, current = std::min(index, last);  // the last group stands for an absent one
        const bool ends = index + PANEL_GROUPS > last, whole = outputs_.whole(current);
        const int next = ends ? index % PANEL_GROUPS : index + PANEL_GROUPS;
        const int next_tile = ends ? begin_ + PANEL_TILES : begin_;
        return {group_at(current), whole ? outputs_.column(current) : scratch_.sums[current > 0],
                whole ? outputs_.stride : static_cast<std::size_t>(GROUP_ROWS),
                group_at(std::min(next, last)).tile(std::min(next_tile, all_tiles_ - 1))};
    }

    Group group_at(int index) const {
        return group_of(outputs_.weights.matrix, outputs_.first_group() + index, outputs_.weights.width);
    }

    void multiply(int group) {
        for (int i = 0; i < PANEL_GROUPS; ++i) parts_[i] = part_of(group + i);
        const bool codes = parts_[0].group.format != FLOAT16 && parts_[1].group.format != FLOAT16;
        if (!codes)
            for (int i = 0; i < PANEL_GROUPS; ++i)
                if (parts_[i].group.format != FLOAT16) std::memset(scratch_.low[i], 0, sizeof scratch_.low[i]);
        for (int pass = 0; pass < passes_; ++pass) codes ? multiply_panel<true>(pass) : multiply_panel<false>(pass);
    }

    // One or two tiles of rows times the panel. The first pass unpacks the weights, one tile ahead, and all passes together
    // request the weights of the next panel, so that memory and arithmetic are busy together.
    template <bool CODES>
    void multiply_panel(int pass) {
        const bool two = rows_ > (2 * pass + 1) * TILE_ROWS;
        const std::uint16_t *x = activations(2 * pass), *y = two ? activations(2 * pass + 1) : x;
        const int lines = ((CODES ? CODE_TILE_BYTES : TILE_HALVES * 2) / LINE_BYTES + passes_ - 1) / passes_;
        const std::size_t requested = static_cast<std::size_t>(pass) * tiles_ * lines * LINE_BYTES;
        const std::uint8_t *next[] = {parts_[0].next + requested, parts_[1].next + requested};
        load_sums(pass, two ? 2 : 1);
        unpack(pass, 0, 0);
        unpack(pass, 1, 0);
        for (int tile = 0; tile < tiles_; ++tile, x += 2 * TILE_HALVES, y += 2 * TILE_HALVES) {
            for (int line = 0; line < lines; ++line, next[0] += LINE_BYTES, next[1] += LINE_BYTES) {
                __builtin_prefetch(next[0], 0, 2);
                __builtin_prefetch(next[1], 0, 2);
            }
            unpack(pass, 0, tile + 1);
            if (!CODES) {
                _tile_loadd(6, scratch_.low[0][slot(tile)], LINE_BYTES);
                _tile_loadd(7, scratch_.low[1][slot(tile)], LINE_BYTES);
                multiply_tiles(x, y, two);
            }
            _tile_loadd(6, scratch_.high[0][slot(tile)], LINE_BYTES);
            _tile_loadd(7, scratch_.high[1][slot(tile)], LINE_BYTES);
            multiply_tiles(x + TILE_HALVES, y + TILE_HALVES, two);
            unpack(pass, 1, tile + 1);
            multiply_tiles(x, y, two);
        }
        store_sums(pass, two ? 2 : 1);
    }

    static void multiply_tiles(const std::uint16_t *x, const std::uint16_t *y, bool two) {
        _tile_loadd(4, x, LINE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!two) return;
        _tile_loadd(5, y, LINE_BYTES);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    void unpack(int pass, int part, int tile) {
        if (pass == 0 && tile < tiles_)
            unpack_parts<false>(parts_[part].group, begin_ + tile, scratch_.high[part][slot(tile)],
                                scratch_.low[part][slot(tile)]);
    }

    // Where an unpacked tile is. If no later pass reads it, it stays in the L1 cache.
    int slot(int tile) const { return passes_ == 1 ? tile % 2 : tile; }

    // Registers 0 and 1 have the sums of the first tile of rows, 2 and 3 those of the second.
    void load_sums(int pass, int row_tiles) const {
        if (begin_ == 0) return zero_sums();
        if (pass + 1 == passes_) copy_last_rows(false);
        for (int i = 0; i < PANEL_GROUPS * row_tiles; ++i)
            load_tile(i, sums_at(i % 2, row_of(pass, i / 2)), stride_at(i % 2, row_of(pass, i / 2)));
    }

    void store_sums(int pass, int row_tiles) const {
        for (int i = 0; i < PANEL_GROUPS * row_tiles; ++i)
            store_tile(i, sums_at(i % 2, row_of(pass, i / 2)), stride_at(i % 2, row_of(pass, i / 2)));
        if (pass + 1 == passes_) copy_last_rows(true);
    }

    static int row_of(int pass, int row_tile) { return (2 * pass + row_tile) * TILE_ROWS; }

    // Where the sums of a tile of rows are. The output ends after the last row, so fewer than 16 rows are elsewhere first.
    bool is_whole(int row) const { return rows_ - row >= TILE_ROWS; }
    float *sums_at(int part, int row) const {
        return is_whole(row) ? parts_[part].sums_of(row) : scratch_.last_rows[part];
    }
    std::size_t stride_at(int part, int row) const {
        return (is_whole(row) ? parts_[part].stride : GROUP_ROWS) * sizeof(float);
    }

    void copy_last_rows(bool to_output) const {
        for (int part = 0; part < PANEL_GROUPS; ++part)
            for (int row = rows_ / TILE_ROWS * TILE_ROWS; row < rows_; ++row) {
                float *last = scratch_.last_rows[part] + row % TILE_ROWS * GROUP_ROWS, *sums = parts_[part].sums_of(row);
                std::memcpy(to_output ? sums : last, to_output ? last : sums, GROUP_ROWS * sizeof(float));
            }
    }

    const std::uint16_t *activations(int row_tile) const {
        return x_ + (static_cast<std::size_t>(row_tile) * all_tiles_ + begin_) * 2 * TILE_HALVES;
    }

    const Outputs &outputs_;
    const std::uint16_t *const x_;
    const int rows_, passes_, all_tiles_;
    ManyRowsScratch &scratch_;
    Part parts_[PANEL_GROUPS];
    int begin_ = 0, tiles_ = 0;  // of the panel, in tiles of inputs
};

void matmul(const MatrixRows &weights, const Activations &activations, float *out, std::size_t out_stride,
            float *memory) {
    const int width = weights.width, rows = activations.rows;
    if (rows <= TILE_ROWS) {
        few_rows({weights, out, out_stride}, width, activations.tiles, rows, *reinterpret_cast<FewRowsScratch *>(memory));
    } else {
        for (int row = 0; row < rows; row += MAX_PASS_ROWS) {
            const Outputs outputs{weights, out + row * out_stride, out_stride};
            const std::uint16_t *x = activations.tiles + static_cast<std::size_t>(row) * tiles_of(width) * TILE_INPUTS * 2;
            ManyRows(outputs, x, std::min(MAX_PASS_ROWS, rows - row), *reinterpret_cast<ManyRowsScratch *>(memory)).run();
        }
    }
    _tile_release();  // a thread with tiles in use has a larger state to switch
}
