// Weights in the order of AMX tiles. decode.cpp includes this file once, inside namespace amx.
//
// A group is 16 rows of a matrix. A tile has 32 inputs of a group: for each of 16 pairs of inputs, one cache line with
// that pair of each row. This is the order of the second operand of TDPBF16PS. Four tiles are a block of 128 inputs.
// A matrix whose width is not a multiple of 128, or whose last group has fewer rows, is padded with zeros.
//
// A group of the format FLOAT16 has its tiles as float16 numbers, 1,024 bytes each. In the other formats, a tile has the
// codes of packing.hpp, 768 bytes: each 4 of its lines are the upper 12 bits of the words of 3 lines, whose lower 4 bits
// are the upper, middle and lower bits of the words of the fourth. With bases, one line follows each block: the base of
// each row, twice, where bfloat16 has its exponent. A code is exactly a bfloat16 number, so nothing is rounded. A group of
// codes starts with flags: one bit for each part of a tile, which is 4 lines, if it has codes with exponent 0.

using avx512::BLOCK_WEIGHTS, avx512::NO_BASE, avx512::NOT_FINITE;

constexpr int GROUP_ROWS = 16, TILE_INPUTS = 32, TILE_LINES = 16, LINE_HALVES = 32, BLOCK_TILES = 4;
constexpr int TILE_HALVES = TILE_LINES * LINE_HALVES;
constexpr int CODE_TILE_BYTES = 768, LINE_BYTES = 64;

constexpr int blocks_of(int width) { return (width + BLOCK_WEIGHTS - 1) / BLOCK_WEIGHTS; }
constexpr int tiles_of(int width) { return blocks_of(width) * BLOCK_TILES; }
constexpr int groups_of(int rows) { return (rows + GROUP_ROWS - 1) / GROUP_ROWS; }

constexpr std::size_t block_bytes(int format) {
    if (format == FLOAT16) return BLOCK_TILES * TILE_HALVES * sizeof(Half);
    return BLOCK_TILES * CODE_TILE_BYTES + (format == TWELVE_BITS ? 0 : LINE_BYTES);
}

// The flags take whole lines.
constexpr std::size_t flag_bytes(int format, int width) {
    return format == FLOAT16 ? 0 : (tiles_of(width) / 2 + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
}

constexpr std::size_t group_bytes(int format, int width) {
    return flag_bytes(format, width) + blocks_of(width) * block_bytes(format);
}

struct Group {
    int format;
    const std::uint8_t *flags, *blocks;

    // The flags of a tile of codes, in the lower 4 bits.
    unsigned small_parts(int index) const { return flags[index / 2] >> index % 2 * 4; }

    // The memory of a tile.
    const std::uint8_t *tile(int index) const {
        const int bytes = format == FLOAT16 ? TILE_HALVES * static_cast<int>(sizeof(Half)) : CODE_TILE_BYTES;
        return blocks + index / BLOCK_TILES * block_bytes(format) + index % BLOCK_TILES * bytes;
    }
};

inline Group group_of(const Matrix &matrix, int group, int width) {
    const std::uint64_t entry = matrix.rows[group];
    const int format = static_cast<int>(entry % ROW_ALIGNMENT);
    const std::uint8_t *memory = matrix.memory + entry / ROW_ALIGNMENT * ROW_ALIGNMENT;
    return {format, memory, memory + flag_bytes(format, width)};
}

// Copies one block of each row of a group; absent rows and inputs are zero.
void copy_block(const Half *from, int rows, int width, int begin, Half (*block)[BLOCK_WEIGHTS]) {
    std::memset(block, 0, GROUP_ROWS * sizeof *block);
    for (int row = 0; row < rows; ++row)
        std::memcpy(block[row], from + static_cast<std::size_t>(row) * width + begin,
                    std::min(BLOCK_WEIGHTS, width - begin) * sizeof(Half));
}

// Returns the format of a group of up to 16 rows, or NOT_FINITE.
int measure_group(const Half *from, int rows, int width, bool twelve_bits) {
    int format = twelve_bits ? TWELVE_BITS : FLOAT16;
    alignas(64) Half block[GROUP_ROWS][BLOCK_WEIGHTS], codes[BLOCK_WEIGHTS];
    for (int begin = 0; begin < width; begin += BLOCK_WEIGHTS) {
        copy_block(from, rows, width, begin, block);
        for (int row = 0; row < rows; ++row) {
            const int base = avx512::find_base(block[row], codes);
            if (base == NOT_FINITE) return NOT_FINITE;
            if (base == NO_BASE) format = FLOAT16;
            if (base > 0 && format != FLOAT16) format = TWELVE_BITS_WITH_BASES;
        }
    }
    return format;
}

std::int64_t measure(const Half *from, int rows, int width, bool twelve_bits, std::uint64_t *entries) {
    std::int64_t bytes = 0;
    for (int group = 0; group < groups_of(rows); ++group) {
        const int first = group * GROUP_ROWS, count = std::min(GROUP_ROWS, rows - first);
        const int format = measure_group(from + static_cast<std::size_t>(first) * width, count, width, twelve_bits);
        if (format == NOT_FINITE) return -1;
        entries[group] = format;
        bytes += group_bytes(format, width);
    }
    return bytes;
}

// Returns the line with a pair of inputs of each row.
inline __m512i line_of(const Half (*rows)[BLOCK_WEIGHTS], int pair) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offsets = _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(BLOCK_WEIGHTS / 2)),
                                             _mm512_set1_epi32(pair));
    return _mm512_i32gather_epi32(offsets, rows, 4);
}

constexpr short CODE_EXPONENT = 0x7800, CODE_BIAS = (127 - 18) << 7;

// Writes four lines of codes, each in the upper 12 bits of its words, as three.
inline void pack_lines(const __m512i (&lines)[4], std::uint8_t *to) {
    const __m512i low = _mm512_set1_epi16(15);
    const int shifts[] = {12, 8, 4};
    for (int i = 0; i < 3; ++i) {
        const __m512i part = _mm512_and_si512(_mm512_srl_epi16(lines[3], _mm_cvtsi32_si128(shifts[i])), low);
        _mm512_storeu_si512(to + i * LINE_BYTES, _mm512_or_si512(lines[i], part));
    }
}

// Packs a block, and writes the flags of its tiles.
void pack_codes(const Half (*block)[BLOCK_WEIGHTS], int format, std::uint8_t *to, std::uint8_t *flags) {
    alignas(64) Half codes[GROUP_ROWS][BLOCK_WEIGHTS], bases[LINE_HALVES];
    for (int row = 0; row < GROUP_ROWS; ++row) {
        const int base = avx512::find_base(block[row], codes[row]);
        bases[2 * row] = bases[2 * row + 1] = static_cast<Half>(base << 7);
        for (Half &code : codes[row]) code = (code & 0x8000) | (code & 0x3ff8) << 1;
    }
    for (int line = 0; line < BLOCK_TILES * TILE_LINES; line += 4) {
        const __m512i lines[4] = {line_of(codes, line), line_of(codes, line + 1), line_of(codes, line + 2),
                                  line_of(codes, line + 3)};
        pack_lines(lines, to + line / 4 * 3 * LINE_BYTES);
        __mmask32 small = 0;
        for (const __m512i &words : lines) small |= _mm512_testn_epi16_mask(words, _mm512_set1_epi16(CODE_EXPONENT));
        flags[line / (2 * TILE_LINES)] |= (small != 0) << line / 4 % 8;
    }
    if (format == TWELVE_BITS_WITH_BASES) std::memcpy(to + BLOCK_TILES * CODE_TILE_BYTES, bases, sizeof bases);
}

void pack(const Half *from, int rows, int width, std::uint64_t *entries, std::uint8_t *memory, std::uint64_t offset) {
    alignas(64) Half block[GROUP_ROWS][BLOCK_WEIGHTS];
    for (int group = 0; group < groups_of(rows); ++group) {
        const int first = group * GROUP_ROWS, count = std::min(GROUP_ROWS, rows - first);
        const int format = static_cast<int>(entries[group]);
        entries[group] |= offset;
        std::uint8_t *flags = memory + offset;
        std::memset(flags, 0, flag_bytes(format, width));
        offset += flag_bytes(format, width);
        for (int begin = 0; begin < width; begin += BLOCK_WEIGHTS, offset += block_bytes(format)) {
            copy_block(from + static_cast<std::size_t>(first) * width, count, width, begin, block);
            if (format != FLOAT16) {
                pack_codes(block, format, memory + offset, flags + begin / TILE_INPUTS / 2);
                continue;
            }
            for (int line = 0; line < BLOCK_TILES * TILE_LINES; ++line)
                _mm512_storeu_si512(memory + offset + line * LINE_BYTES, line_of(block, line));
        }
    }
}

// The bfloat16 numbers m * 2^-24, for the codes with exponent 0.
struct SmallNumbers {
    alignas(64) std::uint16_t bits[BLOCK_WEIGHTS] = {};
    constexpr SmallNumbers() {
        for (int m = 1; m < BLOCK_WEIGHTS; ++m) {
            int exponent = 0;
            while (m >> (exponent + 1) != 0) ++exponent;
            const int mantissa = (m << (7 - exponent)) & 0x7f;
            bits[m] = static_cast<std::uint16_t>((127 - 24 + exponent) << 7 | mantissa);
        }
    }
};
constexpr SmallNumbers small_numbers;


// Decodes a line of codes with exponents above 0, each in the upper 12 bits of its word, to bfloat16.
inline __m512i decode(__m512i words, __m512i bias) {
    const __m512i fields = _mm512_and_si512(_mm512_srai_epi16(words, 4), _mm512_set1_epi16(static_cast<short>(0x87ff)));
    return _mm512_add_epi16(fields, bias);
}

// Replaces the numbers whose codes have exponent 0.
inline __m512i decode_small(__m512i words, __m512i decoded, __m512i bias) {
    const __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(CODE_EXPONENT));
    const __m512i mantissas = _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi16(0x7f));
    const std::uint16_t *table = small_numbers.bits;
    const __m512i low = _mm512_permutex2var_epi16(_mm512_load_si512(table), mantissas, _mm512_load_si512(table + 32));
    const __m512i high =
        _mm512_permutex2var_epi16(_mm512_load_si512(table + 64), mantissas, _mm512_load_si512(table + 96));
    __m512i numbers = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(mantissas, _mm512_set1_epi16(0x40)), low, high);
    const __m512i base = _mm512_sub_epi16(bias, _mm512_set1_epi16(CODE_BIAS));
    numbers = _mm512_mask_add_epi16(numbers, _mm512_test_epi16_mask(mantissas, mantissas), numbers, base);
    numbers = _mm512_or_si512(numbers, _mm512_and_si512(words, _mm512_set1_epi16(static_cast<short>(0x8000))));
    return _mm512_mask_mov_epi16(decoded, small, numbers);
}

// Decodes a tile of codes to a tile of bfloat16. With PREFETCH, it requests a later tile, at `next`.
template <bool PREFETCH>
inline void unpack_codes(const std::uint8_t *from, unsigned small_parts, __m512i bias, std::uint16_t *tile,
                         const std::uint8_t *next) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part, from += 3 * LINE_BYTES, tile += 4 * LINE_HALVES) {
        __m512i words[4];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
            if (PREFETCH) __builtin_prefetch(next + (3 * part + i) * LINE_BYTES, 0, 2);
            words[i] = _mm512_loadu_si512(from + i * LINE_BYTES);
        }
        words[3] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(words[0], 12), _mm512_slli_epi16(words[1], 8),
                                             _mm512_set1_epi16(0x0f00), 0xf8);
        words[3] = _mm512_ternarylogic_epi32(words[3], _mm512_slli_epi16(words[2], 4), _mm512_set1_epi16(0x00f0), 0xf8);
        // A branch on the codes would be decided only when they have come from memory, and hold back the requests.
        if (__builtin_expect((small_parts >> part & 1) == 0, 1)) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) _mm512_store_si512(tile + i * LINE_HALVES, decode(words[i], bias));
        } else {
            for (int i = 0; i < 4; ++i)
                _mm512_store_si512(tile + i * LINE_HALVES, decode_small(words[i], decode(words[i], bias), bias));
        }
    }
}

inline __m512i bias_of(const Group &group, const std::uint8_t *block) {
    const __m512i bias = _mm512_set1_epi16(CODE_BIAS);
    if (group.format != TWELVE_BITS_WITH_BASES) return bias;
    return _mm512_add_epi16(bias, _mm512_loadu_si512(block + BLOCK_TILES * CODE_TILE_BYTES));
}

// Writes a tile of codes as bfloat16.
template <bool PREFETCH>
inline void unpack_tile(const Group &group, int index, std::uint16_t *tile, const std::uint8_t *next) {
    const __m512i bias = bias_of(group, group.blocks + index / BLOCK_TILES * block_bytes(group.format));
    unpack_codes<PREFETCH>(group.tile(index), group.small_parts(index), bias, tile, next);
}

// 16 float16 numbers as sums of two bfloat16 numbers, in the upper halves of the lanes: nothing is rounded.
struct HighLow {
    __m512i high, low;
    explicit HighLow(__m512 numbers) {
        high = _mm512_and_si512(_mm512_castps_si512(numbers), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
        low = _mm512_castps_si512(_mm512_sub_ps(numbers, _mm512_castsi512_ps(high)));
    }
};

// The upper halves of 16 and of 16 further lanes, one after another.
inline __m512i join_upper(__m512i first, __m512i second) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(first, odd, second);
}

// Writes a tile of float16 as the sum of two tiles of bfloat16: the 8 upper significant bits, and the other 3.
template <bool PREFETCH>
inline void split_tile(const Group &group, int index, std::uint16_t *high, std::uint16_t *low,
                       const std::uint8_t *next) {
    const Half *from = reinterpret_cast<const Half *>(group.tile(index));
#pragma GCC unroll 4
    for (int line = 0; line < TILE_LINES; ++line, from += LINE_HALVES) {
        if (PREFETCH) __builtin_prefetch(next + line * LINE_BYTES, 0, 2);
        const HighLow first(avx512::load(from)), second(avx512::load(from + LANES));
        _mm512_store_si512(high + line * LINE_HALVES, join_upper(first.high, second.high));
        _mm512_store_si512(low + line * LINE_HALVES, join_upper(first.low, second.low));
    }
}

// Writes a tile of any format as the sum of two tiles of bfloat16. For codes, it leaves the lower part as it is: zeros.
template <bool PREFETCH>
inline void unpack_parts(const Group &group, int index, std::uint16_t *high, std::uint16_t *low,
                         const std::uint8_t *next = nullptr) {
    group.format == FLOAT16 ? split_tile<PREFETCH>(group, index, high, low, next)
                            : unpack_tile<PREFETCH>(group, index, high, next);
}

inline float from_bfloat16(std::uint16_t number) {
    const std::uint32_t bits = static_cast<std::uint32_t>(number) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

void unpack(const Matrix &matrix, int row, int width, float *out) {
    const Group group = group_of(matrix, row / GROUP_ROWS, width);
    const int column = row % GROUP_ROWS * 2;
    alignas(64) std::uint16_t high[TILE_HALVES], low[TILE_HALVES] = {};
    for (int begin = 0; begin < padded(width); begin += TILE_INPUTS) {
        unpack_parts<false>(group, begin / TILE_INPUTS, high, low);
        for (int i = 0; i < std::min(TILE_INPUTS, padded(width) - begin); ++i) {
            const int at = i / 2 * LINE_HALVES + column + i % 2;
            const float upper = from_bfloat16(high[at]), lower = from_bfloat16(low[at]);
            out[begin + i] = lower == 0 ? upper : upper + lower;  // zero keeps its sign
        }
    }
}
