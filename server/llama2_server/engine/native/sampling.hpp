// Sampling of the next token from float32 logits, by the rules of the reference sampler (engine/sampling.py).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "model.hpp"

// The parameters of one sequence, which Python fills; `native/library.py` mirrors them field by field.
struct SamplingParams {
    double temperature, top_p;                       // temperature 0 = greedy; top_p 1 = off
    double frequency_penalty, presence_penalty;
    float repetition_penalty;
    std::int32_t top_k;  // 0 = all
};

namespace {

constexpr int NO_TOKEN = -1;  // the result for logits that are not finite

// A number whose unsigned order is the descending order of the logits. -0 and 0 have the same key.
inline std::uint32_t descending_key(float logit) {
    logit += 0.0f;  // turns -0 into 0
    std::uint32_t bits;
    std::memcpy(&bits, &logit, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

inline float logit_of_key(std::uint32_t key) {
    const std::uint32_t bits = key >> 31 ? key : ~key & 0x7fffffffu;
    float logit;
    std::memcpy(&logit, &bits, sizeof logit);
    return logit;
}

// A candidate for the draw: its descending key in the upper half, its id in the lower half.
using Candidate = std::uint64_t;

inline Candidate candidate(float logit, std::int32_t id) {
    return static_cast<Candidate>(descending_key(logit)) << 32 | static_cast<std::uint32_t>(id);
}

// Memory that one thread needs to sample. It is allocated once, because a step must not fail.
struct SamplingScratch {
    explicit SamplingScratch(int vocab)
        : penalized(vocab), logits(vocab), likely(vocab), keys(vocab), ids(vocab), indices(vocab), positions(vocab),
          candidates(vocab), sorted(vocab), sums(vocab) {}
    std::vector<float> penalized, logits, likely;
    std::vector<std::uint32_t> keys;
    std::vector<std::int32_t> ids, indices, positions;
    std::vector<Candidate> candidates, sorted;
    std::vector<double> sums;
};

// Sorts `count` candidates, which are in the order of their ids, by their keys: a stable radix sort (Knuth, TAOCP 3,
// 5.2.5). Returns `items` or `buffer`, whichever holds the result. Its time depends on the count only.
template <int BITS>
Candidate *sort_candidates(Candidate *items, Candidate *buffer, int count) {
    constexpr int PASSES = (32 + BITS - 1) / BITS;
    constexpr std::uint32_t BUCKETS = 1u << BITS;
    std::array<std::array<std::int32_t, BUCKETS>, PASSES> counts{};
    for (int i = 0; i < count; ++i)
        for (int pass = 0; pass < PASSES; ++pass) ++counts[pass][items[i] >> (32 + BITS * pass) & (BUCKETS - 1)];
    for (int pass = 0; pass < PASSES; ++pass) {
        const int shift = 32 + BITS * pass;
        auto &starts = counts[pass];
        if (starts[items[0] >> shift & (BUCKETS - 1)] == count) continue;  // all have the same digit
        std::int32_t next = 0;
        for (std::int32_t &start : starts) next += std::exchange(start, next);
        for (int i = 0; i < count; ++i) buffer[starts[items[i] >> shift & (BUCKETS - 1)]++] = items[i];
        std::swap(items, buffer);
    }
    return items;
}

// Returns the `rank`-th largest logit (1 = the largest), by counting the digits of the keys.
inline float ranked_logit(const float *logits, int count, int rank, SamplingScratch &scratch) {
    std::uint32_t *keys = scratch.keys.data();
    for (int i = 0; i < count; ++i) keys[i] = descending_key(logits[i]);
    std::uint32_t key = 0;
    for (const int shift : {21, 10, 0}) {
        const std::uint32_t buckets = shift == 0 ? 1u << 10 : 1u << 11;
        std::array<std::int32_t, 1u << 11> counts{};
        for (int i = 0; i < count; ++i) ++counts[keys[i] >> shift & (buckets - 1)];
        std::uint32_t bucket = 0;
        while (rank > counts[bucket]) rank -= counts[bucket++];
        key |= bucket << shift;
        int kept = 0;
        for (int i = 0; i < count; ++i) {
            const std::uint32_t found = keys[i];
            keys[kept] = found;
            kept += (found >> shift & (buckets - 1)) == bucket;
        }
        count = kept;
    }
    return logit_of_key(key);
}

// The sampling state of one sequence: its parameters and, for penalties, the tokens seen so far.
class Sampler {
  public:
    // Throws std::out_of_range if a prompt token does not exist.
    Sampler(int vocab, const SamplingParams &params, const std::int32_t *prompt, int prompt_tokens)
        : vocab_(vocab), params_(params), counts_(has_penalties() ? vocab : 0, UNSEEN) {
        if (!has_penalties()) return;
        seen_.reserve(vocab);  // so that a step does not allocate
        for (int i = 0; i < prompt_tokens; ++i) {
            if (prompt[i] < 0 || prompt[i] >= vocab) throw std::out_of_range("a prompt token does not exist");
            see(prompt[i]);
        }
    }

    int vocab() const { return vocab_; }

    // Returns the id of the next token, or NO_TOKEN if a logit is not finite. `uniform` in [0, 1) selects the token.
    int sample(const Kernels &kernels, const float *logits, double uniform, SamplingScratch &scratch) {
        if (has_penalties()) logits = penalized(logits, scratch);
        const float largest = kernels.largest(logits, vocab_);
        if (std::isnan(largest)) return NO_TOKEN;
        int token;
        if (params_.temperature == 0) {
            kernels.collect(logits, vocab_, largest, scratch.ids.data());
            token = scratch.ids[0];  // the lowest id of those with the largest logit
        } else {
            token = draw(kernels, logits, largest, uniform, scratch);
        }
        if (has_penalties()) {
            see(token);
            ++counts_[token];
        }
        return token;
    }

  private:
    static constexpr std::int32_t UNSEEN = -1;

    bool has_penalties() const {
        return params_.repetition_penalty != 1 || params_.frequency_penalty != 0 || params_.presence_penalty != 0;
    }

    void see(std::int32_t token) {
        if (counts_[token] != UNSEEN) return;
        counts_[token] = 0;
        seen_.push_back(token);
    }

    const float *penalized(const float *logits, SamplingScratch &scratch) const {
        float *out = scratch.penalized.data();
        std::memcpy(out, logits, vocab_ * sizeof *out);
        for (const std::int32_t token : seen_) {
            const float penalty = params_.repetition_penalty, logit = out[token];
            // Keskar et al. 2019 (CTRL), with transformers' correction for negative logits.
            const float scaled = penalty == 1 ? logit : logit < 0 ? logit * penalty : logit / penalty;
            const std::int32_t count = counts_[token];
            const double offset =
                count > 0 ? params_.frequency_penalty * count + params_.presence_penalty : 0.0;
            out[token] = scaled - static_cast<float>(offset);
        }
        return out;
    }

    int draw(const Kernels &kernels, const float *logits, float largest, double uniform,
             SamplingScratch &scratch) const {
        // A finite factor, because infinity times a difference of 0 is not a number.
        const double factor = std::min(1 / params_.temperature, std::numeric_limits<double>::max());
        int count = vocab_;
        const std::int32_t *ids = nullptr;  // null: the candidates are all tokens
        if (0 < params_.top_k && params_.top_k < vocab_) {
            const float smallest = ranked_logit(logits, vocab_, params_.top_k, scratch);
            count = kernels.collect(logits, vocab_, smallest, scratch.ids.data());
            ids = scratch.ids.data();
            for (int i = 0; i < count; ++i) scratch.logits[i] = logits[ids[i]];
            logits = scratch.logits.data();
        }
        double *sums = scratch.sums.data();
        if (params_.top_p >= 1) {
            kernels.weigh(logits, count, largest, factor, sums);
            std::partial_sum(sums, sums + count, sums);
            const int index = invert(sums, count, uniform);
            return ids == nullptr ? index : ids[index];
        }
        return draw_from_nucleus(kernels, logits, ids, count, largest, factor, uniform, scratch);
    }

    int draw_from_nucleus(const Kernels &kernels, const float *logits, const std::int32_t *ids, int count,
                          float largest, double factor, double uniform, SamplingScratch &scratch) const {
        double total = kernels.sum_of_weights(logits, count, largest, factor);
        const int kept = likely_candidates(kernels, logits, ids, count, largest, factor, total, scratch);
        const Candidate *sorted = kept < (1 << 12)
                                      ? sort_candidates<8>(scratch.candidates.data(), scratch.sorted.data(), kept)
                                      : sort_candidates<11>(scratch.candidates.data(), scratch.sorted.data(), kept);
        float *sorted_logits = scratch.logits.data();
        for (int i = 0; i < kept; ++i) sorted_logits[i] = logit_of_key(static_cast<std::uint32_t>(sorted[i] >> 32));
        double *sums = scratch.sums.data();
        kernels.weigh(sorted_logits, kept, largest, factor, sums);
        std::partial_sum(sums, sums + kept, sums);
        if (kept == count) total = sums[kept - 1];
        const double *end = std::lower_bound(sums, sums + kept, params_.top_p * total);
        const int nucleus = std::min(static_cast<int>(end - sums) + 1, kept);
        return static_cast<std::int32_t>(sorted[invert(sums, nucleus, uniform)]);
    }

    // Writes the candidates that can belong to the nucleus, in the order of their ids, and returns their number. They
    // are few if the nucleus is small, because only they are sorted.
    int likely_candidates(const Kernels &kernels, const float *logits, const std::int32_t *ids, int count,
                          float largest, double factor, double total, SamplingScratch &scratch) const {
        std::int32_t *indices = scratch.indices.data();
        float *likely = scratch.likely.data();
        // The weight that may be left out: half of the weight outside the nucleus, because sums are rounded.
        double negligible = 0.5 * (1 - params_.top_p) * total;
        int kept = kernels.collect(logits, count, smallest_logit(largest, negligible / count), indices);
        for (int i = 0; i < kept; ++i) likely[i] = logits[indices[i]];
        for (int before = count; kept < before / 2 && 1 - params_.top_p > 1e-6;) {
            before = kept;
            const double left_out = total - kernels.sum_of_weights(likely, kept, largest, factor);
            const double smallest = (negligible - left_out) / kept;
            if (smallest <= 0) break;
            kept = kernels.collect(likely, kept, smallest_logit(largest, smallest), scratch.positions.data());
            for (int i = 0; i < kept; ++i) {
                likely[i] = likely[scratch.positions[i]];
                indices[i] = indices[scratch.positions[i]];
            }
        }
        for (int i = 0; i < kept; ++i)
            scratch.candidates[i] = candidate(likely[i], ids == nullptr ? indices[i] : ids[indices[i]]);
        return kept;
    }

    // Returns a logit below which every weight is smaller than `weight`.
    float smallest_logit(float largest, double weight) const {
        const double smallest = largest + std::log(weight) * params_.temperature;
        return std::nextafter(static_cast<float>(smallest), -INFINITY);  // because the conversion can round up
    }

    // Returns the first index whose cumulative sum is above the share `uniform` of the last sum.
    static int invert(const double *sums, int count, double uniform) {
        const double total = sums[count - 1];
        // The product can be rounded up to the whole sum: then the last weight that changes the sum is drawn.
        return static_cast<int>(std::min(std::upper_bound(sums, sums + count, uniform * total),
                                         std::lower_bound(sums, sums + count, total)) -
                                sums);
    }

    const int vocab_;
    const SamplingParams params_;
    std::vector<std::int32_t> counts_;  // by token: how often it was generated, 0 if only in the prompt, or UNSEEN
    std::vector<std::int32_t> seen_;    // the tokens that have a count
};

}  // namespace
