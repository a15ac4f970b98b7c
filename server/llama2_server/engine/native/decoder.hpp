// The decoder: the stages of a step and how each stage is split into chunks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "model.hpp"
#include "sampling.hpp"
#include "thread_pool.hpp"

namespace {

constexpr int CHUNK_BYTES = 1 << 19;  // of weights: about 25 microseconds of reading, so that a lost core delays little
constexpr int INPUT_ROWS = 16;  // rows that a thread prepares together
constexpr int MIN_PROMPT_ROWS = 16;  // prompt tokens for which a step has room next to one row of each slot

// A matrix of floats. Each row is padded with zeros to whole vectors and starts at a cache line, because a vector that
// spans two cache lines costs two reads.
class PaddedMatrix {
  public:
    PaddedMatrix(int rows, int width)
        // One more cache line per row, so that the stride is not a power of two: otherwise all rows would map to the
        // same set of the L1 cache.
        : stride(padded(width) + LANES), cache_lines_(static_cast<std::size_t>(rows) * stride / LANES) {}
    float *operator[](int row) { return cache_lines_.data()->lanes + static_cast<std::size_t>(row) * stride; }
    const std::size_t stride;

  private:
    struct alignas(64) CacheLine {
        float lanes[LANES];
    };
    std::vector<CacheLine> cache_lines_;
};

constexpr int NOT_SAMPLED = -2;  // the result for a row whose token was not sampled by the row before it

// How a step samples: the sampler of each row, its number in [0, 1), and where its token is written. Consecutive rows
// with one sampler are a token of a sequence and its drafts, which are guesses of the next tokens.
struct Sampling {
    Sampler *const *samplers;
    const double *uniforms;
    std::int32_t *tokens;
};

// A model, its threads and the activations of one step.
class Decoder final : ThreadPool {
  public:
    Decoder(const Model &model, const Layer *layers, const Kernels &kernels, int threads)
        : ThreadPool(threads),
          model_(model),
          layers_(layers, layers + model.layers),
          kernels_(kernels),
          threads_(threads),
          max_rows_(std::max(model.slots + MIN_PROMPT_ROWS, kernels.prefill_rows)),
          query_width_(model.heads * model.head_dim),
          key_width_(model.kv_heads * model.head_dim),
          x_(max_rows_, model.hidden),
          normed_(max_rows_, model.hidden),
          sublayer_output_(max_rows_, model.hidden),
          qkv_(max_rows_, query_width_ + 2 * key_width_),
          attended_(max_rows_, query_width_),
          gate_up_(max_rows_, 2 * model.inner),
          inner_(max_rows_, model.inner),
          scratch_(threads, static_cast<int>(kernels.attention_floats(group(), model.head_dim, model.context))),
          // Only packed weights need it.
          unpacked_(threads, model.head.rows == nullptr ? 0 : static_cast<int>(kernels.scratch_floats(widest()))),
          // Two 16-bit numbers fit into a float.
          tiles_(1, static_cast<int>(kernels.tile_numbers(max_rows_, widest()) / 2)),
          logits_memory_(static_cast<std::size_t>(max_rows_) * model.vocab),
          sampling_(threads, SamplingScratch(model.vocab)) {
        token_runs_.reserve(max_rows_);
        sampled_runs_.reserve(max_rows_);
    }

    // Appends one token to each row's slot and computes logits (logit_rows, vocab) for the last `logit_rows` rows. Rows
    // of the same slot must be ordered by position. If `logits` is null, it samples one token for each of these rows
    // instead. Of consecutive rows with one sampler, a row is sampled only if the row before it sampled this row's token:
    // the others are NOT_SAMPLED, and neither they nor their numbers change the state of the sampler.
    void step(int rows, const std::int32_t *slots, const std::int32_t *tokens, const std::int32_t *positions,
              int logit_rows, float *logits, const Sampling &sampling) {
        rows_ = rows;
        logit_rows_ = logit_rows;
        slots_ = slots;
        tokens_ = tokens;
        positions_ = positions;
        logits_ = logits == nullptr ? logits_memory_.data() : logits;
        sample_ = logits == nullptr;
        samples_ = sampling;
        for (int row = 0; row < rows; ++row) {
            kernels_.unpack(model_.embedding, tokens[row], model_.hidden, x_[row]);
        }
        find_token_runs();
        if (sample_) find_sampled_runs();
        stage_ = -1;
        run();
    }

    const Model &model() const { return model_; }
    int max_rows() const { return max_rows_; }

  private:
    struct RowRun {
        int first, rows;
    };
    // What an input stage does to its rows.
    struct Input {
        int width;
        const Half *norm;  // null: no normalization
        bool adds;         // the output of the sublayer
    };
    // An input stage prepares the rows that the stage after it multiplies.
    enum Stage {
        QKV_INPUT, QKV, APPEND, ATTEND, OUTPUT_INPUT, OUTPUT, GATE_UP_INPUT, GATE_UP, DOWN_INPUT, DOWN, STAGES_PER_LAYER
    };
    enum FinalStage { LOGITS_INPUT, LOGITS, SAMPLE, END };  // after those of all layers

    int widest() const { return std::max({model_.hidden, model_.inner, query_width_}); }
    int group() const { return model_.heads / model_.kv_heads; }
    std::uint16_t *tiles() { return reinterpret_cast<std::uint16_t *>(tiles_[0]); }
    int final_stage() const { return stage_ - STAGES_PER_LAYER * model_.layers; }
    const Layer &layer() const { return layers_[stage_ / STAGES_PER_LAYER]; }

    int next_stage() override {
        while (++stage_, final_stage() < END) {
            const int chunks = final_stage() < 0 ? open_stage_of_layer() : open_final_stage();
            if (chunks > 0) return chunks;
        }
        return 0;
    }

    int open_stage_of_layer() {
        const int hidden = model_.hidden;
        switch (stage_ % STAGES_PER_LAYER) {
            case QKV_INPUT:
                return prepare(normed_, rows_, hidden, layer().attention_norm, stage_ > 0);
            case QKV:
                return open_matmul(query_width_ + 2 * key_width_, hidden);
            case APPEND:  // all rows before ATTEND, because tokens of a prompt attend to one another
                return open_or_run(static_cast<int>(token_runs_.size()), rows_);
            case ATTEND:
                return static_cast<int>(token_runs_.size()) * model_.kv_heads;
            case OUTPUT_INPUT:
                return prepare(attended_, rows_, query_width_);
            case OUTPUT:
                return open_matmul(hidden, query_width_);
            case GATE_UP_INPUT:
                return prepare(normed_, rows_, hidden, layer().mlp_norm, true);
            case GATE_UP:
                return open_matmul(model_.inner, hidden, 2);
            case DOWN_INPUT:
                return prepare(inner_, rows_, model_.inner);
            default:
                return open_matmul(hidden, model_.inner);
        }
    }

    int open_final_stage() {
        if (logit_rows_ == 0) return 0;
        switch (final_stage()) {
            case LOGITS_INPUT:
                return prepare(normed_, logit_rows_, model_.hidden, model_.norm, true);
            case LOGITS:
                return open_matmul(model_.vocab, model_.hidden);
            default:
                return sample_ ? static_cast<int>(sampled_runs_.size()) : 0;
        }
    }

    void run_chunk(int thread, int chunk) override {
        const int begin = chunk * outputs_per_chunk_;
        if (final_stage() >= 0) return run_chunk_of_final_stage(thread, chunk, begin);
        switch (stage_ % STAGES_PER_LAYER) {
            case QKV:
                return matmul(thread, chunk_of(layer().qkv, query_width_ + 2 * key_width_, model_.hidden, begin),
                              qkv_[0] + begin, qkv_.stride);
            case APPEND:
                for (int head = 0; head < model_.kv_heads; ++head)
                    kernels_.append_to_cache(attention(thread, token_runs_[chunk], head));
                return;
            case ATTEND:
                return kernels_.attend(
                    attention(thread, token_runs_[chunk / model_.kv_heads], chunk % model_.kv_heads));
            case OUTPUT:
                return matmul(thread, chunk_of(layer().output, model_.hidden, query_width_, begin),
                              sublayer_output_[0] + begin, sublayer_output_.stride);
            case GATE_UP:
                return gate_up(thread, begin);
            case DOWN:
                return matmul(thread, chunk_of(layer().down, model_.hidden, model_.inner, begin),
                              sublayer_output_[0] + begin, sublayer_output_.stride);
            default:
                return prepare_rows(chunk);
        }
    }

    void run_chunk_of_final_stage(int thread, int chunk, int begin) {
        switch (final_stage()) {
            case LOGITS_INPUT:
                return prepare_rows(chunk);
            case LOGITS:
                return matmul(thread, chunk_of(model_.head, model_.vocab, model_.hidden, begin), logits_ + begin,
                              model_.vocab);
            default:
                return sample(thread, sampled_runs_[chunk]);
        }
    }

    // Returns the number of chunks of a stage that is short for few rows: too short to share with threads that may sleep.
    // The thread that opens it then runs it, and none is left.
    int open_or_run(int chunks, int rows) {
        if (rows > INPUT_ROWS) return chunks;
        for (int chunk = 0; chunk < chunks; ++chunk) run_chunk(0, chunk);
        return 0;
    }

    // Prepares the last `rows` rows of `x` for a matmul by rows of `width` weights: with `norm`, it first adds the output of
    // the sublayer, if `adds`, and writes the normalized rows to `x`.
    int prepare(PaddedMatrix &x, int rows, int width, const Half *norm = nullptr, bool adds = false) {
        activations_ = {x[rows_ - rows], x.stride, rows, kernels_.split == nullptr ? nullptr : tiles()};
        input_ = {width, norm, adds};
        if (norm == nullptr && activations_.tiles == nullptr) return 0;
        return open_or_run((rows + INPUT_ROWS - 1) / INPUT_ROWS, rows);
    }

    void prepare_rows(int chunk) {
        const int begin = chunk * INPUT_ROWS, count = std::min(INPUT_ROWS, activations_.rows - begin);
        if (input_.norm != nullptr) {
            for (int row = rows_ - activations_.rows + begin, end = row + count; row < end; ++row) {
                if (input_.adds) add_sublayer_output(row);
                kernels_.rmsnorm(x_[row], input_.norm, model_.hidden, model_.norm_epsilon, normed_[row]);
            }
        }
        if (activations_.tiles != nullptr) kernels_.split(activations_, begin, count, input_.width, tiles());
    }

    // Samples the rows of one run until a sampled token differs from the next row's token.
    void sample(int thread, const RowRun &run) {
        const std::int32_t *tokens = tokens_ + rows_ - logit_rows_;
        for (int row = run.first; row < run.first + run.rows; ++row) {
            if (row > run.first && samples_.tokens[row - 1] != tokens[row]) {
                samples_.tokens[row] = NOT_SAMPLED;
                continue;
            }
            const float *logits = logits_ + static_cast<std::size_t>(row) * model_.vocab;
            samples_.tokens[row] =
                samples_.samplers[row]->sample(kernels_, logits, samples_.uniforms[row], sampling_[thread]);
        }
    }

    // Splits a matmul of the prepared rows by `outputs` rows of `width` weights, or by this multiple of them, into chunks
    // and returns their number.
    int open_matmul(int outputs, int width, int multiple = 1) {
        int per_chunk = outputs;
        if (threads_ > 1) {
            const int bytes = multiple * width * static_cast<int>(sizeof(Half)), block = kernels_.output_block;
            per_chunk = outputs / (4 * threads_);
            // Each chunk reads all activations. Tiles of many rows do not fit into the cache, so their chunks are larger.
            if (activations_.tiles == nullptr || activations_.rows <= INPUT_ROWS)
                per_chunk = std::min(CHUNK_BYTES / bytes, per_chunk);
            per_chunk = std::max(per_chunk / block, 1) * block;
        }
        outputs_per_chunk_ = per_chunk;
        return (outputs + per_chunk - 1) / per_chunk;
    }

    // Returns the rows of the matrix, which has `outputs` rows, that belong to the chunk from `begin` on.
    MatrixRows chunk_of(const Matrix &matrix, int outputs, int width, int begin) const {
        return {matrix, begin, std::min(outputs_per_chunk_, outputs - begin), width};
    }

    // Multiplies the activations of the stage by rows of a matrix.
    void matmul(int thread, const MatrixRows &weights, float *out, std::size_t out_stride) {
        kernels_.matmul(weights, activations_, out, out_stride, unpacked_[thread]);
    }

    void gate_up(int thread, int begin) {
        const int inner = model_.inner;
        MatrixRows weights = chunk_of(layer().gate_up, inner, model_.hidden, begin);
        matmul(thread, weights, gate_up_[0] + begin, gate_up_.stride);
        weights.begin += inner;
        matmul(thread, weights, gate_up_[0] + inner + begin, gate_up_.stride);
        for (int row = 0; row < rows_; ++row) {
            const float *gates = gate_up_[row] + begin;
            kernels_.swiglu(gates, gates + inner, weights.outputs, inner_[row] + begin);
        }
    }

    // Groups a few consecutive tokens of a slot, so that they share each read of its keys.
    void find_token_runs() {
        token_runs_.clear();
        for (int row = 0; row < rows_; ++row) {
            const bool follows =
                row > 0 && slots_[row] == slots_[row - 1] && positions_[row] == positions_[row - 1] + 1;
            if (follows && token_runs_.back().rows < kernels_.attention_tokens(group()))
                ++token_runs_.back().rows;
            else
                token_runs_.push_back({row, 1});
        }
    }

    void find_sampled_runs() {
        sampled_runs_.clear();
        for (int row = 0; row < logit_rows_; ++row) {
            if (row > 0 && samples_.samplers[row] == samples_.samplers[row - 1])
                ++sampled_runs_.back().rows;
            else
                sampled_runs_.push_back({row, 1});
        }
    }

    Attention attention(int thread, RowRun run, int head) {
        const int dim = model_.head_dim, row = run.first, position = positions_[row];
        const std::size_t cached = static_cast<std::size_t>(slots_[row]) * model_.kv_heads + head;
        const std::size_t offset = cached * model_.context * dim;
        const float *key = qkv_[row] + query_width_ + head * dim;
        Attention attention;
        attention.queries = qkv_[row] + head * group() * dim;
        attention.key = key;
        attention.value = key + key_width_;
        attention.stride = qkv_.stride;
        attention.cosines = model_.cosines + static_cast<std::size_t>(position) * dim;
        attention.sines = model_.sines + static_cast<std::size_t>(position) * dim;
        attention.keys = layer().keys + offset;
        attention.values = layer().values + offset;
        attention.next_keys = attention.keys + static_cast<std::size_t>(model_.context) * dim;  // of the next head
        attention.tokens = run.rows;
        attention.position = position;
        attention.group = group();
        attention.head_dim = dim;
        attention.out = attended_[row] + head * group() * dim;
        attention.out_stride = attended_.stride;
        attention.scratch = scratch_[thread];
        return attention;
    }

    void add_sublayer_output(int row) {
        float *x = x_[row];
        const float *change = sublayer_output_[row];
        for (int i = 0; i < model_.hidden; ++i) x[i] += change[i];
    }

    const Model model_;
    const std::vector<Layer> layers_;
    const Kernels &kernels_;
    const int threads_, max_rows_, query_width_, key_width_;
    PaddedMatrix x_, normed_, sublayer_output_, qkv_, attended_, gate_up_, inner_, scratch_, unpacked_, tiles_;
    // The current step. The thread that opens a stage writes these before its ticket; threads read them after they take
    // one of its chunks.
    int rows_ = 0, logit_rows_ = 0, stage_ = 0, outputs_per_chunk_ = 0;
    Activations activations_{};
    Input input_{};
    std::vector<RowRun> token_runs_;    // consecutive rows that are consecutive tokens of a slot
    std::vector<RowRun> sampled_runs_;  // consecutive rows with one sampler; the first row with logits is 0
    const std::int32_t *slots_ = nullptr, *tokens_ = nullptr, *positions_ = nullptr;
    float *logits_ = nullptr;
    bool sample_ = false;
    Sampling samples_{};
    std::vector<float> logits_memory_;
    std::vector<SamplingScratch> sampling_;
};

}  // namespace
