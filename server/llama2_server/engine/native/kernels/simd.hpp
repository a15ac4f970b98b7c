// Vectors of 16 floats: the code that differs between instruction sets.
// kernels.hpp includes this file once per instruction set.

// A vector takes one or more registers. `keep_in_register` prevents reloads: if an instruction can take a memory
// operand, compilers reload the vector at each use, and the loads become the bottleneck instead of the arithmetic.
#if defined(LLAMA2_AVX512)
using Vector = __m512;
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float *from) { return _mm512_loadu_ps(from); }
inline Vector widen(__m256i halves) { return _mm512_cvtph_ps(halves); }
inline Vector load(const Half *from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))); }
inline void store(float *to, Vector v) { _mm512_storeu_ps(to, v); }
inline void store(Half *to, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector keep_in_register(Vector v) {
    asm("" : "+v"(v));
    return v;
}
inline __m256 add_halves(Vector v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
#elif defined(__x86_64__)
struct Vector {
    __m256 low, high;
};
inline Vector broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Vector load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Vector widen(__m256i halves) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
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
inline Vector multiply(Vector a, Vector b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vector maximum(Vector a, Vector b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vector keep_in_register(Vector v) {
    asm("" : "+x"(v.low), "+x"(v.high));
    return v;
}
inline __m256 add_halves(Vector v) { return _mm256_add_ps(v.low, v.high); }
#else
struct Vector {
    float32x4_t part[4];
};
inline Vector broadcast(float value) {
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
inline Vector multiply(Vector a, Vector b) {
    for (int i = 0; i < 4; ++i) a.part[i] = vmulq_f32(a.part[i], b.part[i]);
    return a;
}
inline Vector maximum(Vector a, Vector b) {
    for (int i = 0; i < 4; ++i) a.part[i] = vmaxq_f32(a.part[i], b.part[i]);
    return a;
}
inline Vector keep_in_register(Vector v) { return v; }  // NEON arithmetic has no memory operands
#endif

// The sum of all lanes: 16 -> 8 -> 4 -> 2 -> 1, each time the upper half is added to the lower.
#if defined(__x86_64__)
inline float sum(Vector v) {
    const __m256 eight = add_halves(v);
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

#if defined(LLAMA2_AVX512)
// The sum of each of 16 vectors: the additions of `sum`, in the same order, for several vectors at once.
inline Vector sum_each(const Vector (&v)[LANES]) {
    Vector eight[8], four[4], two[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                                 _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        two[i] = _mm512_add_ps(_mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0xee));
    const Vector sums = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
    // Number 4 * i + j of the sums is that of vector 4 * j + i.
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums);
}
#endif

// The last numbers of a row whose width is not a multiple of 16, followed by zeros.
inline Vector load_partial(const Half *from, int count) {
    Half whole[LANES] = {};
    std::memcpy(whole, from, count * sizeof(Half));
    return load(whole);
}

inline void store_partial(Half *to, Vector v, int count) {
    Half whole[LANES];
    store(whole, v);
    std::memcpy(to, whole, count * sizeof(Half));
}

// load_codes decodes 16 codes of a block of the packed format (packing.hpp), at `index` * 16, to float16: 8 times the
// weights.
#if defined(__x86_64__)
inline __m256i load_words(const std::uint8_t *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}
// Returns words | (others & mask).
inline __m256i insert(__m256i words, __m256i others, short mask) {
#if defined(LLAMA2_AVX512)
    return _mm256_ternarylogic_epi32(words, others, _mm256_set1_epi16(mask), 0xf8);
#else
    return _mm256_or_si256(words, _mm256_and_si256(others, _mm256_set1_epi16(mask)));
#endif
}
inline void store(Half *to, __m256i halves) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), halves); }
inline __m256i last_words(const std::uint8_t *from) {
    const __m256i upper = _mm256_slli_epi16(load_words(from), 12), middle = _mm256_slli_epi16(load_words(from + 64), 8);
    const __m256i lower = _mm256_slli_epi16(load_words(from + 128), 4);
    return insert(insert(upper, middle, 0x0f00), lower, 0x00f0);
}
inline __m256i load_codes(const std::uint8_t *block, int index) {
    const __m256i words = index < 6 ? load_words(block + 32 * index) : last_words(block + 32 * (index - 6));
    return _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(static_cast<short>(0xbff8)));
}
#else
inline uint16x8_t load_words(const std::uint8_t *from) { return vreinterpretq_u16_u8(vld1q_u8(from)); }
inline uint16x8_t last_words(const std::uint8_t *from) {
    const uint16x8_t upper = vshlq_n_u16(load_words(from), 12), middle = vshlq_n_u16(load_words(from + 64), 8);
    const uint16x8_t lower = vshlq_n_u16(load_words(from + 128), 4);
    return vorrq_u16(vorrq_u16(upper, vandq_u16(middle, vdupq_n_u16(0x0f00))), vandq_u16(lower, vdupq_n_u16(0x00f0)));
}
inline uint16x8x2_t load_codes(const std::uint8_t *block, int index) {
    uint16x8x2_t halves;
    for (int half = 0; half < 2; ++half) {
        const std::uint8_t *from = block + 16 * half;
        const uint16x8_t words = index < 6 ? load_words(from + 32 * index) : last_words(from + 32 * (index - 6));
        const int16x8_t shifted = vshrq_n_s16(vreinterpretq_s16_u16(words), 1);
        halves.val[half] = vandq_u16(vreinterpretq_u16_s16(shifted), vdupq_n_u16(0xbff8));
    }
    return halves;
}
inline Vector widen(uint16x8x2_t halves) {
    Vector v;
    for (int half = 0; half < 2; ++half) {
        const float16x8_t numbers = vreinterpretq_f16_u16(halves.val[half]);
        v.part[2 * half] = vcvt_f32_f16(vget_low_f16(numbers));
        v.part[2 * half + 1] = vcvt_f32_f16(vget_high_f16(numbers));
    }
    return v;
}
inline void store(Half *to, uint16x8x2_t halves) {
    vst1q_u16(to, halves.val[0]);
    vst1q_u16(to + 8, halves.val[1]);
}
#endif

// Writes the indices, counted from `first`, of all floats among 16 that are at least `smallest`, and returns their
// number. It may write 16 indices.
#if defined(LLAMA2_AVX512)
inline int collect(const float *from, float smallest, std::int32_t first, std::int32_t *indices) {
    const __mmask16 found = _mm512_cmp_ps_mask(load(from), broadcast(smallest), _CMP_GE_OQ);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i all = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(found, all));
    return __builtin_popcount(found);
}
#else
inline int collect(const float *from, float smallest, std::int32_t first, std::int32_t *indices) {
#if defined(__x86_64__)
    const Vector v = load(from), limit = broadcast(smallest);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(v.low, limit.low, _CMP_GE_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(v.high, limit.high, _CMP_GE_OQ));
    unsigned found = static_cast<unsigned>(low | high << 8);
#else
    unsigned found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= static_cast<unsigned>(from[lane] >= smallest) << lane;
#endif
    int count = 0;
    for (; found != 0; found &= found - 1) indices[count++] = first + __builtin_ctz(found);
    return count;
}
#endif
