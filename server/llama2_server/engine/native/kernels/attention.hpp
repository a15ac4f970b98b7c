// Attention kernels, which work on the KV cache. kernels.hpp includes this file once per instruction set.

constexpr int KV_PREFETCH_DISTANCE = 3072;  // keys or values, in numbers
constexpr int ATTENTION_ROWS = 4;

// Rows of queries, then of sums, then of scores.
std::size_t attention_floats(int group, int head_dim, int context) {
    return std::max(ATTENTION_ROWS / group, 1) * group * static_cast<std::size_t>(2 * padded(head_dim) + padded(context));
}

// Rotary embedding with the pairing of transformers' rotate_half: a head's first half with its second.
void rotate(const float *x, const float *cosines, const float *sines, int dim, float scale, float *out) {
    const int half = dim / 2;
    for (int i = 0; i < half; ++i) {
        out[i] = (x[i] * cosines[i] + x[i + half] * sines[i]) * scale;
        out[i + half] = (x[i + half] * cosines[i + half] + x[i] * sines[i + half]) * scale;
    }
}

void narrow(const float *from, int count, Half *to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i == count) return;
    float last[LANES] = {};
    std::memcpy(last, from + i, (count - i) * sizeof(float));
    store_partial(to + i, load(last), count - i);
}

// Replaces scores by weights that add up to 1, followed by zeros up to a whole vector.
void softmax(float *scores, int count) {
    std::fill(scores + count, scores + padded(count), std::numeric_limits<float>::lowest());
    Vector found = load(scores);
    for (int i = LANES; i < count; i += LANES) found = maximum(load(scores + i), found);
    float lanes[LANES];
    store(lanes, found);
    float largest = lanes[0];
    for (int lane = 1; lane < LANES; ++lane) largest = std::max(largest, lanes[lane]);
    for (int i = 0; i < padded(count); ++i) scores[i] = exponential(scores[i] - largest);
    std::fill(scores + count, scores + padded(count), 0.0f);
    Vector total = broadcast(0);
    for (int i = 0; i < count; i += LANES) total = fma(load(scores + i), broadcast(1), total);
    const float scale = 1 / sum(total);
    for (int i = 0; i < padded(count); ++i) scores[i] *= scale;
}

// sums[row][0 .. 16 * VECTORS) += weights[row] . values, over `count` rows of values.
template <int ROWS, int VECTORS>
void weighted_sum_block(const float *weights, std::size_t weights_stride, const Half *values, int count, int head_dim,
                        float *sums, std::size_t stride) {
    Vector v[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) v[row][j] = load(sums + row * stride + j * LANES);
    for (int i = 0; i < count; ++i, values += head_dim) {
        if (ROWS == 1)
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; j += 2) __builtin_prefetch(values + KV_PREFETCH_DISTANCE + j * LANES, 0, 2);
        Vector value[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) value[j] = load(values + j * LANES);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const Vector weight = broadcast(weights[row * weights_stride + i]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) v[row][j] = fma(weight, value[j], v[row][j]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) store(sums + row * stride + j * LANES, v[row][j]);
}

template <int ROWS>
void weighted_sum(const float *weights, std::size_t weights_stride, const Half *values, int count, int head_dim,
                  float *sums, std::size_t stride) {
#if defined(LLAMA2_AVX512)
    constexpr int VECTORS = 4;
#else
    constexpr int VECTORS = ROWS == 1 ? 4 : 1;
#endif
    int d = 0;
    for (; d + VECTORS * LANES <= head_dim; d += VECTORS * LANES)
        weighted_sum_block<ROWS, VECTORS>(weights, weights_stride, values + d, count, head_dim, sums + d, stride);
    for (; d + LANES <= head_dim; d += LANES)
        weighted_sum_block<ROWS, 1>(weights, weights_stride, values + d, count, head_dim, sums + d, stride);
    if (d == head_dim) return;
    for (int row = 0; row < ROWS; ++row) {
        Vector last = load(sums + row * stride + d);
        for (int i = 0; i < count; ++i)
            last = fma(broadcast(weights[row * weights_stride + i]),
                       load_partial(values + static_cast<std::size_t>(i) * head_dim + d, head_dim - d), last);
        store(sums + row * stride + d, last);
    }
}

#if defined(LLAMA2_AVX512)
// out[row][key] = queries[row] . keys[key] for LANES / ROWS keys. A key is short, so most of a product alone would be
// the sum of its lanes.
template <int ROWS>
void score_tile(const Half *keys, int dim, const float *queries, std::size_t stride, float *out, std::size_t out_stride) {
    constexpr int KEYS = LANES / ROWS;
    Vector sums[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) sums[i] = broadcast(0);
    const auto add = [&](int i, const auto &load_key) __attribute__((always_inline)) {
        Vector query[ROWS];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) query[row] = load(queries + row * stride + i);
#pragma GCC unroll 16
        for (int key = 0; key < KEYS; ++key) {
            const Vector numbers = keep_in_register(load_key(keys + static_cast<std::size_t>(key) * dim + i));
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; ++row) sums[row * KEYS + key] = fma(numbers, query[row], sums[row * KEYS + key]);
        }
    };
    for (int i = 0; i < KEYS * dim; i += 2 * LANES) __builtin_prefetch(keys + KV_PREFETCH_DISTANCE + i, 0, 2);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) add(i, [](const Half *from) { return load(from); });
    if (i < dim) add(i, [&](const Half *from) { return load_partial(from, dim - i); });
    float scores[LANES];
    store(scores, sum_each(sums));
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) std::memcpy(out + row * out_stride, scores + row * KEYS, KEYS * sizeof(float));
}

template <int ROWS>
void score_rows(const Half *keys, int count, int dim, const float *queries, std::size_t stride, float *out,
                std::size_t out_stride) {
    constexpr int KEYS = LANES / ROWS;
    int key = 0;
    for (; key + KEYS <= count; key += KEYS)
        score_tile<ROWS>(keys + static_cast<std::size_t>(key) * dim, dim, queries, stride, out + key, out_stride);
    matmul(keys + static_cast<std::size_t>(key) * dim, count - key, dim, queries, stride, ROWS, out + key, out_stride);
}

// out[row][key] = queries[row] . keys[key], with the bits of `matmul`.
void score(const Half *keys, int count, int dim, const float *queries, std::size_t stride, int rows, float *out,
           std::size_t out_stride) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        score_rows<4>(keys, count, dim, queries + row * stride, stride, out + row * out_stride, out_stride);
    for (; row + 2 <= rows; row += 2)
        score_rows<2>(keys, count, dim, queries + row * stride, stride, out + row * out_stride, out_stride);
    for (; row < rows; ++row)
        score_rows<1>(keys, count, dim, queries + row * stride, stride, out + row * out_stride, out_stride);
}
#else
void score(const Half *keys, int count, int dim, const float *queries, std::size_t stride, int rows, float *out,
           std::size_t out_stride) {
    matmul(keys, count, dim, queries, stride, rows, out, out_stride);
}
#endif

void append_to_cache(const Attention &a) {
    const int dim = a.head_dim;
    for (int token = 0; token < a.tokens; ++token) {
        const std::size_t from = token * a.stride, to = static_cast<std::size_t>(a.position + token) * dim;
        rotate(a.key + from, a.cosines + token * dim, a.sines + token * dim, dim, 1, a.scratch);
        narrow(a.scratch, dim, a.keys + to);
        narrow(a.value + from, dim, a.values + to);
    }
}

// Attends with all queries of all tokens of `a` at once to the keys that they share, then with each later token to its
// additional keys.
void attend(const Attention &a) {
    constexpr int BLOCK = 64;  // positions whose values stay in the L1 cache while all queries use them
    const int dim = a.head_dim, rows = a.tokens * a.group, common = a.position + 1, all_keys = a.position + a.tokens;
    const std::size_t stride = padded(dim), scores_stride = padded(all_keys);
    const int max_rows = std::max(ATTENTION_ROWS / a.group, 1) * a.group;
    float *queries = a.scratch, *sums = queries + max_rows * stride, *scores = sums + max_rows * stride;
    const float scale = 1 / std::sqrt(static_cast<float>(dim));
    for (int row = 0; row < rows; ++row) {
        const int token = row / a.group, head = row % a.group;
        rotate(a.queries + token * a.stride + head * dim, a.cosines + token * dim, a.sines + token * dim, dim, scale,
               queries + row * stride);
    }
    score(a.keys, all_keys, dim, queries, stride, rows, scores, scores_stride);
    for (int row = 0; row < rows; ++row) softmax(scores + row * scores_stride, common + row / a.group);
    std::fill(sums, sums + rows * stride, 0.0f);
    for (int begin = 0; begin < common; begin += BLOCK) {
        const int count = std::min(BLOCK, common - begin);
        const Half *values = a.values + static_cast<std::size_t>(begin) * dim;
        int row = 0;
        for (; row + 4 <= rows; row += 4)
            weighted_sum<4>(scores + row * scores_stride + begin, scores_stride, values, count, dim,
                            sums + row * stride, stride);
        for (; row < rows; ++row)
            weighted_sum<1>(scores + row * scores_stride + begin, scores_stride, values, count, dim,
                            sums + row * stride, stride);
    }
    for (int row = 0; row < rows; ++row) {
        const int token = row / a.group, head = row % a.group;
        weighted_sum<1>(scores + row * scores_stride + common, scores_stride,
                        a.values + static_cast<std::size_t>(common) * dim, token, dim, sums + row * stride, stride);
        std::memcpy(a.out + token * a.out_stride + head * dim, sums + row * stride, dim * sizeof(float));
    }
}
