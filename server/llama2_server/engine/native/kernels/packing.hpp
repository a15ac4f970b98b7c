// The packed format of weight rows: float16 numbers in 12 bits, if that is exact. kernels.hpp includes this file once per
// instruction set, and all of them write the same bytes.
//
// Float16 weights that were converted from bfloat16 have at most 8 significant bits. A code has a sign, a 4-bit exponent
// and a 7-bit mantissa. Together with the base b of a block of 128 numbers it means the number code * 2^b, where the
// codes of base 0 are exactly the float16 numbers below 0.25 with at most 8 significant bits: also zeros and the
// multiples of 2^-24 below the normal numbers of float16. Nothing is rounded.
//
// A block takes 192 bytes. Its first 96 codes are the upper 12 bits of 96 words of 16 bits. The lower 4 bits of words i,
// 32 + i and 64 + i are the upper, middle and lower 4 bits of code 96 + i. Shifting a word right by one bit, with its
// sign, and clearing bits 14 and 2 to 0 gives a float16: 8 times the number. Thus kernels sum up 8 * weight * activation
// and multiply the sum by 1/8, which is exact. All of these are normal numbers of float32.
//
// A row has its whole blocks, then the numbers that do not fill a block as float16, then, from the next cache line on,
// the base of each block in a byte. Rows whose bases are all 0 have none. Rows that do not fit stay float16.

constexpr int BLOCK_WEIGHTS = 128, BLOCK_BYTES = 192;
constexpr int CODE_SCALE = 8;  // a decoded float is this multiple of the weight
constexpr Half NOT_A_CODE = 0x4007;  // bits that are zero in the float16 of every code
constexpr int MAX_BLOCKS = (1 << 18) / BLOCK_WEIGHTS;  // checkpoint/files.py limits the width of a matrix

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT; }

constexpr std::size_t bases_offset(int width) {
    return aligned(width / BLOCK_WEIGHTS * BLOCK_BYTES + width % BLOCK_WEIGHTS * sizeof(Half));
}

constexpr std::size_t row_bytes(int format, int width) {
    if (format == FLOAT16) return aligned(width * sizeof(Half));
    return bases_offset(width) + (format == TWELVE_BITS ? 0 : aligned(width / BLOCK_WEIGHTS));
}

inline float power_of_two(int exponent) {
    const std::uint32_t bits = static_cast<std::uint32_t>(127 + exponent) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

// Writes numbers times 2^exponent as float16.
void scale_halves(const Half *from, int count, int exponent, Half *to) {
    const Vector factor = broadcast(power_of_two(exponent));
    for (int i = 0; i < count; i += LANES) store(to + i, multiply(load(from + i), factor));
}

// The bits of the largest magnitude: at least 0x7c00 if a number is not finite.
int largest_magnitude(const Half *from, int count) {
    int largest = 0;
    for (int i = 0; i < count; ++i) largest = std::max(largest, from[i] & 0x7fff);
    return largest;
}

int bits_of_all(const Half *from, int count) {
    int bits = 0;
    for (int i = 0; i < count; ++i) bits |= from[i];
    return bits;
}

constexpr int NO_BASE = -1, NOT_FINITE = -2;

// Returns the base of a block and writes the float16 of each code, or returns NO_BASE or NOT_FINITE.
int find_base(const Half *block, Half *codes) {
    scale_halves(block, BLOCK_WEIGHTS, 3, codes);
    if ((bits_of_all(codes, BLOCK_WEIGHTS) & NOT_A_CODE) == 0) return 0;
    const int largest = largest_magnitude(block, BLOCK_WEIGHTS);
    if (largest >= 0x7c00) return NOT_FINITE;
    // The smallest base that holds the largest number; a larger one only loses small numbers. 0.25 has the exponent 13.
    const int base = std::max((largest >> 10) - 12, 0);
    if (base == 0) return NO_BASE;
    Half restored[BLOCK_WEIGHTS];
    scale_halves(block, BLOCK_WEIGHTS, 3 - base, codes);
    scale_halves(codes, BLOCK_WEIGHTS, base - 3, restored);
    const bool exact = std::memcmp(block, restored, sizeof restored) == 0;
    return exact && (bits_of_all(codes, BLOCK_WEIGHTS) & NOT_A_CODE) == 0 ? base : NO_BASE;
}

// Returns the format of a row, or NOT_FINITE.
int measure_row(const Half *row, int width) {
    Half codes[BLOCK_WEIGHTS];
    const int whole = width / BLOCK_WEIGHTS * BLOCK_WEIGHTS;
    int format = whole == 0 ? FLOAT16 : TWELVE_BITS;
    if (largest_magnitude(row + whole, width - whole) >= 0x7c00) return NOT_FINITE;
    for (int i = 0; i < whole; i += BLOCK_WEIGHTS) {
        const int base = find_base(row + i, codes);
        if (base == NOT_FINITE) return NOT_FINITE;
        if (base == NO_BASE) format = FLOAT16;
        if (base > 0 && format != FLOAT16) format = TWELVE_BITS_WITH_BASES;
    }
    return format;
}

std::int64_t measure(const Half *from, int rows, int width, bool twelve_bits, std::uint64_t *entries) {
    std::int64_t bytes = 0;
    for (int row = 0; row < rows; ++row) {
        const int measured = measure_row(from + static_cast<std::size_t>(row) * width, width);
        if (measured == NOT_FINITE) return -1;
        const int format = twelve_bits ? measured : FLOAT16;
        entries[row] = format;
        bytes += row_bytes(format, width);
    }
    return bytes;
}

void pack_block(const Half *codes, std::uint8_t *to) {
    Half upper[BLOCK_WEIGHTS], words[96];  // a code in the upper 12 bits of each word
    for (int i = 0; i < BLOCK_WEIGHTS; ++i) upper[i] = (codes[i] & 0x8000) | (codes[i] & 0x3ff8) << 1;
    for (int i = 0; i < 32; ++i) {
        const Half last = upper[96 + i];
        words[i] = upper[i] | last >> 12;
        words[32 + i] = upper[32 + i] | (last >> 8 & 15);
        words[64 + i] = upper[64 + i] | (last >> 4 & 15);
    }
    std::memcpy(to, words, sizeof words);
}

void pack_row(const Half *row, int width, int format, std::uint8_t *to) {
    Half codes[BLOCK_WEIGHTS];
    std::uint8_t bases[MAX_BLOCKS];
    const int blocks = format == FLOAT16 ? 0 : width / BLOCK_WEIGHTS;
    for (int block = 0; block < blocks; ++block) {
        bases[block] = static_cast<std::uint8_t>(find_base(row + block * BLOCK_WEIGHTS, codes));
        pack_block(codes, to + block * BLOCK_BYTES);
    }
    std::memcpy(to + blocks * BLOCK_BYTES, row + blocks * BLOCK_WEIGHTS, (width - blocks * BLOCK_WEIGHTS) * sizeof(Half));
    if (format == TWELVE_BITS_WITH_BASES) std::memcpy(to + bases_offset(width), bases, blocks);
}

void pack(const Half *from, int rows, int width, std::uint64_t *entries, std::uint8_t *memory, std::uint64_t offset) {
    for (int row = 0; row < rows; ++row) {
        const int format = static_cast<int>(entries[row]);
        pack_row(from + static_cast<std::size_t>(row) * width, width, format, memory + offset);
        entries[row] |= offset;
        offset += row_bytes(format, width);
    }
}
